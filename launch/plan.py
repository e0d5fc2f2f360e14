"""Plans a run on a TPU slice without owning one: memory, FLOPs, collectives, days.

  pip install -r requirements.txt -r launch/requirements-tpu.txt
  python launch/plan.py --config=configs/imagenet_efficientnet.py:b7 --topology=v5e:16x16
  python launch/plan.py --config=configs/imagenet_resnet.py:50 --topology=v4:2x2x2 --json

Compiles the very train step for that slice, on this machine's CPU, from shapes alone: no TPU, no
network, no data. Where the step does not fit in the chips' memory, smaller micro-batches are tried.
A compilation takes minutes; its results are kept, and the same command prints them at once.
"""

import importlib.util
import json
import pathlib
import re
import sys

from absl import app, flags
from ml_collections import config_flags

ROOT = str(pathlib.Path(__file__).resolve().parents[1])
if ROOT not in sys.path:               # started as a script, only its own folder is
  sys.path.insert(0, ROOT)

from advprop_jax.errors import InputError  # noqa: E402
from advprop_jax.experiment import open_split, resolve  # noqa: E402
from advprop_jax.runtime.config import require_known  # noqa: E402
from launch import fitting, plan_report, slices, step_program  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file of training; FILE.py:VARIANT passes VARIANT to it, "
    "--config.section.field=value changes a field. Where it has a choice of chips, those of the "
    "slice are chosen.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, such as v5e:16x16 or v4:4x4x4.")
_CLASSES = flags.DEFINE_integer("classes", None, "Classes of the data; known for ImageNet.")
_IMAGES = flags.DEFINE_integer("images", None, "Images to train on; known for ImageNet.")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.2, "Share of the chips' peak that training reaches, for the days. An "
    "assumption: nothing here has measured it.", lower_bound=1e-3, upper_bound=1.0)
_JSON = flags.DEFINE_bool("json", False, "Print JSON, with all numbers and collectives.")
_SEARCH = flags.DEFINE_bool("search", True, "Try smaller micro-batches where the step does not "
                            "fit; --nosearch compiles the config's own alone.")
_KEPT = flags.DEFINE_bool("kept", True, "Take results that were kept; --nokept compiles again.")
_HLO = flags.DEFINE_string("hlo", None, "File for the text of the last compiled program.")

BAD_INPUT, DOES_NOT_FIT = 2, 1         # exit codes
IMAGENET = (1000, 1_281_167)           # classes, training images
DATA = {"imagenet2012": IMAGENET, "imagenet_folder": IMAGENET}


def main(argv: list[str]) -> int:
  """Compiles, and prints the plan."""
  del argv
  for flag in (_CONFIG, _TOPOLOGY):
    if not flag.value:
      raise InputError(f"--{flag.name}: not given; see --help")
  slice_ = slices.parse_slice(_TOPOLOGY.value)
  recipe = make_recipe(_CONFIG.value, slice_, _CLASSES.value, _IMAGES.value)
  devices = slices.open_devices(slice_)
  folder = step_program.cache_folder()

  def attempt(recipe):
    compiled = step_program.cached(recipe, folder) if _KEPT.value and not _HLO.value else None
    if compiled is not None:
      return fitting.Attempt(recipe, compiled, was_kept=True)
    print(f"Compiling for {slice_.name}, which takes minutes: {fitting.describe(recipe)}",
          file=sys.stderr, flush=True)
    compiled = step_program.compile_step(recipe, devices, _HLO.value)
    step_program.keep(recipe, compiled, folder)
    return fitting.Attempt(recipe, compiled)

  attempts = fitting.fit(recipe, attempt, _SEARCH.value)
  if _JSON.value:
    print(json.dumps(plan_report.as_json(attempts, _UTILISATION.value), indent=2))
  else:
    print(plan_report.text(attempts, _UTILISATION.value))
  return 0 if attempts[-1].compiled.fits else DOES_NOT_FIT


def make_recipe(config, slice_: slices.Slice, classes: int | None = None,
                images: int | None = None) -> step_program.Recipe:
  """What is to be compiled.

  Args:
    config: of a training. Weights that it would begin with are not read.
    slice_: to compile for.
    classes: of the data; None: as its name says, or as the data says that is here.
    images: to train on; None as well.

  Raises:
    InputError: the config cannot work on so many devices, or the data is neither known nor here.
  """
  config = config.copy_and_resolve_references()
  config.model.pretrained = None
  config = resolve(config, devices=slice_.chips)
  if None in (classes, images):
    known = DATA.get(config.data.name)
    if known is None:
      try:
        source = open_split(config.data, config.data.train_split)
      except InputError as error:
        raise InputError(f"{error}; or give --classes and --images") from error
      known = (source.num_classes, len(source))
    classes, images = classes or known[0], images or known[1]
  return step_program.Recipe(config, slice_, classes, images)


def with_chips(argv: list[str]) -> list[str]:
  """The arguments, with the slice's number of chips in the config's variant.

  It is added where the config file has a choice of chips, CHOICES["chips"], with this number, and
  where the variant does not say it.
  """
  given = {flag: re.search(rf"^--?{flag}(?:=|\n)(.*)$", "\n".join(argv), re.MULTILINE)
           for flag in ("config", "topology")}
  if None in given.values():
    return argv
  chips = str(slices.parse_slice(given["topology"].group(1)).chips)
  path, _, variant = given["config"].group(1).partition(":")
  choices = _choices(path)
  words = {word.rpartition("=") for word in variant.split(",")}
  if chips not in choices.get("chips", ()) or any(
      name == "chips" or (not name and value in choices["chips"]) for name, _, value in words):
    return argv
  old = given["config"].group(1)
  new = f"{path}:{','.join(filter(None, (variant, f'chips={chips}')))}"
  return [arg.replace(old, new) if arg in (old, f"--config={old}", f"-config={old}") else arg
          for arg in argv]


def _choices(path: str) -> dict:
  """CHOICES of a config file; empty where it has none or cannot be read, which is said later."""
  spec = importlib.util.spec_from_file_location("config_file", path)
  if spec is None or not pathlib.Path(path).is_file():
    return {}
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception:
    return {}
  return getattr(module, "CHOICES", {})


def run() -> None:
  """The command line: bad input ends in one sentence and exit code 2, without a traceback."""
  try:
    app.run(main, flags_parser=_parse)
  except InputError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them or in the config file is the user's to mend."""
  for path in re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE):
    require_known(path)
  argv = with_chips(argv)
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.keys()  # a config file that could not be read says so only when it is used
    return rest
  except InputError:
    raise
  except (flags.Error, AttributeError, ImportError, KeyError, NameError, OSError, SyntaxError,
          TypeError, ValueError) as error:
    last = str(error).strip().splitlines()[-1].strip()
    raise InputError(re.sub(r"^\w+Error: |^\[Errno \d+\] ", "", last)) from error


if __name__ == "__main__":
  run()
