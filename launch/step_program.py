"""The train step of a config, compiled for a TPU slice on a machine without TPUs.

It is the very step of training, `method.step.train_step` in the pmap of `runtime.parallel`, from
shapes alone: no data, no weights. What the compiler says of it is kept in the user's cache folder,
as a compilation takes minutes.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time

import jax
import jax.numpy as jnp

import advprop_jax
from advprop_jax import experiment as experiments
from advprop_jax.errors import InputError
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import Method, train_step
from advprop_jax.runtime import flops, hlo, parallel
from advprop_jax.runtime.config import create_scheme
from advprop_jax.runtime.metrics import read_json, write_json
from launch import slices
from launch.recipe import Recipe

FORMAT = 1                             # of what is kept; another one is compiled again
# What the step is made of, below the package. What a run does beside it changes no program.
SOURCES = ("method/*.py", "models/*.py", "runtime/parallel.py", "runtime/config.py",
           "runtime/hlo.py", "runtime/flops.py", "experiment.py")
SECTIONS = ("scheme", "seed", "model", "attack", "loss", "optimizer", "train")
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a step; of one chip, where nothing else is said.

  Attributes:
    fits: whether it compiled; without memory for it the compiler refuses.
    needed_bytes: of HBM, the most at any time; where it does not fit, what the compiler says that
      it would need.
    available_bytes: of HBM, as the compiler says when it refuses; None where it fits.
    bytes: of "arguments" (state and batch), "outputs" (beyond the donated state), "temporaries" and
      "code".
    flops: of convolutions and matrix products of one step, each loop as often as it runs.
    flops_once: the same with the body of each loop once.
    xla_flops: of everything, by XLA's cost analysis, with the body of each loop once.
    unknown_loops: whether a loop with FLOPs does not say how often it runs.
    collectives: of one step: `hlo.Collective` as dictionaries.
    lower_seconds: of tracing the step.
    compile_seconds: of compiling it.
    compile_cpu_seconds: the same of all cores together, whatever else they had to do meanwhile.
    refusal: the compiler's words, where it does not fit.
  """

  fits: bool
  needed_bytes: int
  available_bytes: int | None = None
  bytes: dict[str, int] = dataclasses.field(default_factory=dict)
  flops: int | None = None
  flops_once: int | None = None
  xla_flops: float | None = None
  unknown_loops: bool = False
  collectives: tuple[dict, ...] = ()
  lower_seconds: float = 0.0
  compile_seconds: float = 0.0
  compile_cpu_seconds: float = 0.0
  refusal: str = ""


def create_method(recipe: Recipe) -> Method:
  """The method of a recipe, as `advprop_jax.experiment` makes it, but without opening the data."""
  config, scheme = recipe.config, create_scheme(recipe.config)
  steps = recipe.num_images / config.data.batch_size
  steps = steps / scheme.budget if scheme.same_budget else steps
  schedule = experiments.create_schedule(config.optimizer, steps, recipe.total_steps)
  return experiments.create_method(config, scheme, recipe.num_classes, schedule,
                                   experiments.training_attack(config, steps))


def lower(recipe: Recipe, devices: list[jax.Device]) -> jax.stages.Lowered:
  """The traced step of a recipe for these devices, of any platform."""
  config, method = recipe.config, create_method(recipe)
  state = jax.eval_shape(functools.partial(
      create_train_state, method.model, method.optimizer, config.seed, config.data.image_size,
      ema=config.train.ema_decay > 0))
  images, size = config.data.batch_size // len(devices), config.data.image_size
  batch = {part.source: jax.ShapeDtypeStruct((len(devices), images, size, size, 3), jnp.uint8)
           for part in method.scheme.made}
  batch["label"] = jax.ShapeDtypeStruct((len(devices), images), jnp.int32)
  step = parallel.pmap(functools.partial(train_step, method), donate_state=True, devices=devices)
  return step.lower(state, batch)


def compile_step(recipe: Recipe, devices: list[jax.Device], text_file: str | None = None
                 ) -> Compiled:
  """Compiles the step of a recipe: minutes.

  Args:
    recipe: what to compile.
    devices: of its slice.
    text_file: where to write the compiled program's text; None for nowhere.

  Raises:
    InputError: the text cannot be written.
  """
  start = time.perf_counter()
  lowered = lower(recipe, devices)
  traced, cpu = time.perf_counter(), time.process_time()

  def seconds():
    return {"lower_seconds": round(traced - start, 1),
            "compile_seconds": round(time.perf_counter() - traced, 1),
            "compile_cpu_seconds": round(time.process_time() - cpu, 1)}

  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = refusal(str(error))
    if refused is None:
      raise
    return dataclasses.replace(refused, **seconds())
  taken, text = seconds(), program.as_text()
  if text_file:
    _write(text_file, text)
  memory, counted = program.memory_analysis(), flops.count(text)
  return Compiled(
      fits=True, needed_bytes=memory.peak_memory_in_bytes,
      bytes={"arguments": memory.argument_size_in_bytes,
             "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
             "temporaries": memory.temp_size_in_bytes,
             "code": memory.generated_code_size_in_bytes},
      flops=counted.total, flops_once=counted.once, unknown_loops=counted.unknown_loops,
      xla_flops=program.cost_analysis().get("flops"),
      collectives=tuple(map(dataclasses.asdict, hlo.collectives(text))), **taken)


def refusal(message: str) -> Compiled | None:
  """What the compiler's error says, where it is that the program needs more memory than there is.

  Its words are "... memory required for HLO temporaries (68.02G) exceeds available HBM (15.75G)",
  or, later on its way, "Ran out of memory in memory space hbm. Used 18.20G of 15.75G hbm."
  """
  found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
  found = found or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
  if found is None:
    return None
  needed, needed_unit, available, unit = found.groups()
  return Compiled(fits=False, needed_bytes=round(float(needed) * _SIZES[needed_unit]),
                  available_bytes=round(float(available) * _SIZES[unit]), refusal=found.group())


def cached(recipe: Recipe, folder: pathlib.Path | None) -> Compiled | None:
  """What was kept of this recipe, by this code and this compiler; None for nothing."""
  kept = read_json(folder / f"{_key(recipe)}.json") if folder else {}
  try:
    return Compiled(**kept["compiled"])
  except (KeyError, TypeError):
    return None


def keep(recipe: Recipe, compiled: Compiled, folder: pathlib.Path | None) -> None:
  """Keeps it for `cached`; a folder that cannot be written keeps nothing."""
  if folder is None:
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{_key(recipe)}.json", {
        **_identity(recipe), "compiled": dataclasses.asdict(compiled)})
  except (OSError, InputError):
    return


def cache_folder() -> pathlib.Path:
  """In the user's cache folder."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(home, "advprop_jax", "plans")


def versions() -> dict[str, str]:
  """Of what compiles."""
  return {**{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
          "libtpu": slices.libtpu_version()}


def _identity(recipe: Recipe) -> dict:
  config, package = recipe.config.to_dict(), pathlib.Path(advprop_jax.__file__).parent
  code = hashlib.sha256()
  for path in sorted(path for pattern in SOURCES for path in package.glob(pattern)):
    code.update(path.name.encode() + b"\0" + path.read_bytes())
  return {"format": FORMAT, "topology": recipe.slice.name, "num_classes": recipe.num_classes,
          "num_images": recipe.num_images, "versions": versions(), "code": code.hexdigest(),
          "config": {**{name: config[name] for name in SECTIONS},
                     "data": {name: config["data"][name] for name in ("batch_size", "image_size")}}}


def _key(recipe: Recipe) -> str:
  identity = json.dumps(_identity(recipe), sort_keys=True)
  return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _write(path: str, text: str) -> None:
  try:
    pathlib.Path(path).write_text(text, encoding="utf-8")
  except OSError as error:
    raise InputError(f"--hlo={path}: cannot be written ({error.strerror})") from error
