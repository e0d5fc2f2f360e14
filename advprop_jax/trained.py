"""Networks with their weights, wherever they come from: a run, an export, or published files."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from advprop_jax import models
from advprop_jax.data import imagenet
from advprop_jax.data.transforms import published_crop
from advprop_jax.errors import InputError
from advprop_jax.method.schemes import Scheme
from advprop_jax.method.step import to_model_units
from advprop_jax.models import weight_files, weights
from advprop_jax.models.batch_norm import drop_auxiliary
from advprop_jax.models.conventions import convention_named
from advprop_jax.models.network import Network
from advprop_jax.runtime.checkpoint import Checkpoints, Restored
from advprop_jax.runtime.config import create_network, create_scheme
from advprop_jax.runtime.metrics import read_json, write_json

BEST_METRIC = "clean_top1"      # by which the best checkpoint of a run is kept
CLASSES = "classes.json"        # of a run: the names of its classes, in the order of the labels
EXPORTED = "network.json"       # of an exported checkpoint: all that is known of it
VARIABLES = "variables"         # beside it
NOTHING = ("there is no checkpoint in it; train first, with --mode=train, or name weights by "
           "config.model.pretrained")
AVERAGES, TRAINED = "averages", "trained"


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
  """A network and its weights.

  Attributes:
    name: one of models.NAMES.
    variables: {"params": ..., "batch_stats": ..., ...}, of any domains.
    input_convention: what its first convolution reads; None where nobody knows.
    class_names: in the order of the logits; None where nobody knows.
    image_size: side of the images that it is evaluated on, pixels.
    crop_fraction: of the shorter side of an image, that the square given to the network has.
    source: what the weights are, for people to read, without a path of this machine.
    config: of the run that trained it, resolved; None for published weights.
    step: number of updates behind them; None for published weights.
    dtype: of the computation.
  """

  name: str
  variables: Mapping[str, Any]
  input_convention: str | None
  class_names: tuple[str, ...] | None
  image_size: int
  crop_fraction: float
  source: str
  config: dict[str, Any] | None = None
  step: int | None = None
  dtype: str = "float32"

  @property
  def num_classes(self) -> int:
    return weights.num_classes(self.variables)

  @property
  def model(self) -> Network:
    """The network that is deployed, of the main domain alone."""
    return models.create_model(self.name, self.num_classes, dtype=self.dtype,
                               input_convention=self.convention)

  @property
  def deployed(self) -> dict[str, Any]:
    """The variables of `model`."""
    return drop_auxiliary(self.variables)

  @property
  def convention(self) -> str:
    """The input convention; an InputError where nobody knows it."""
    if self.input_convention is None:
      raise InputError(
          f"config.model.input_convention: the name {self.source!r} does not tell how images were "
          "normalised; give 'inception' for weights of AdvProp, whose images are in [-1, 1], or "
          "'imagenet' for ImageNet's mean and deviation")
    return self.input_convention

  @property
  def whole(self) -> tuple[Network, Mapping[str, Any]]:
    """The network with all the domains that its variables have, and these.

    Without a run behind it, or exported, it has the main one alone.
    """
    if self.config is not None:
      model = create_network(self.config, self.num_classes)
      if traverse_util.flatten_dict(_shapes(model)).keys() <= traverse_util.flatten_dict(
          self.variables).keys():
        return model, self.variables
    return self.model, self.deployed

  @property
  def scheme(self) -> Scheme | None:
    """By which it was trained; None where nobody knows."""
    return None if self.config is None else create_scheme(self.config)

  @property
  def kind(self) -> str:
    """Which weights of a run these are: "moving averages" or "as trained"."""
    return self.source.partition(", ")[2]

  def class_name(self, label: int) -> str:
    """For people to read; a wnid of ImageNet becomes its words."""
    if self.class_names is None:
      return f"class {label}"
    return imagenet.words(self.class_names[label])


def classify(model: Network, variables: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
  """Logits, (n, classes), of uint8 images (n, size, size, 3)."""
  return model.apply(variables, to_model_units(pixels))


def read(source: str, name: str | None) -> TrainedNetwork:
  """Reads the weights of a network.

  Args:
    source: workdir of a run, folder of an exported checkpoint, or what `weight_files.find` takes.
    name: of the network that they are expected to be of; None for any, where the source `is_ours`
      and so knows it.

  Returns:
    The network; of a run, the moving averages of its newest checkpoint.

  Raises:
    InputError: it cannot be found or read, or is another network.
  """
  if os.path.exists(os.path.join(source, EXPORTED)):
    network = read_exported(source)
  elif has_checkpoints(source):
    network = read_run(source)
  else:
    return _published(source, name)
  if name is not None:
    _require_network(source, name, network.name)
  return network


def is_ours(source: str) -> bool:
  """Whether weights are those of a run or of an exported checkpoint, which know their network."""
  return os.path.exists(os.path.join(source, EXPORTED)) or has_checkpoints(source)


def has_begun(workdir: str) -> bool:
  """Whether a training has begun in a folder, perhaps without a checkpoint yet."""
  return os.path.exists(os.path.join(workdir, "config.json")) or has_checkpoints(workdir)


def has_checkpoints(workdir: str) -> bool:
  """Whether a folder is that of a run with at least one checkpoint."""
  folder = pathlib.Path(workdir, "checkpoints")
  return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def read_run(workdir: str, checkpoint: str = "newest", kind: str = AVERAGES) -> TrainedNetwork:
  """The network of a run.

  Args:
    workdir: of the run.
    checkpoint: "newest" or "best".
    kind: AVERAGES, or TRAINED: the weights themselves. A run without averages has only these.

  Raises:
    InputError: no checkpoint is whole, or config.json is not.
  """
  config = read_json(os.path.join(workdir, "config.json"))
  if not config:
    raise InputError(f"the run in {workdir!r} has no config.json that is whole; bring it back")
  averages = kind == AVERAGES and config["train"]["ema_decay"] > 0
  names = read_classes(workdir)
  shapes = _shapes(create_network(config, len(names)))
  if averages:
    wanted = {"ema": shapes}
  else:
    params = shapes.pop("params")
    wanted = {"params": params, "batch_stats": shapes}
  restored = _restore(os.path.join(workdir, "checkpoints"), wanted, checkpoint)
  state = restored.state
  variables = state["ema"] if averages else {"params": state["params"], **state["batch_stats"]}
  return TrainedNetwork(
      name=models.canonical_name(config["model"]["name"]), variables=variables,
      input_convention=config["model"]["input_convention"], class_names=names,
      image_size=config["data"]["image_size"], crop_fraction=config["data"]["crop_fraction"],
      source=f"step {restored.step}, {'moving averages' if averages else 'as trained'}",
      config=config, step=restored.step, dtype=config["model"]["dtype"])


def read_exported(folder: str) -> TrainedNetwork:
  """The network of an exported checkpoint (`write_exported`)."""
  facts = read_json(os.path.join(folder, EXPORTED))
  try:
    model = models.create_model(facts["name"], facts.pop("num_classes"))
    names = facts.pop("class_names")
    network = TrainedNetwork(variables={}, class_names=names and tuple(names), **facts)
  except (LookupError, TypeError) as error:
    raise InputError(f"{os.path.join(folder, EXPORTED)!r} is not whole; export the network "
                     "again") from error
  restored = _restore(os.path.join(folder, VARIABLES), _shapes(model))
  return dataclasses.replace(network, variables=restored.state)


def write_exported(network: TrainedNetwork, folder: str) -> None:
  """Writes the deployed network: EXPORTED, and variables/ by Orbax."""
  facts = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)
           if field.name != "variables"}
  facts["config"] = network.config and _without_paths(network.config)
  with Checkpoints(os.path.join(folder, VARIABLES)) as checkpoints:
    checkpoints.save(network.step or 0, jax.tree.map(jnp.asarray, network.deployed), {}, {})
  write_json(os.path.join(folder, EXPORTED), {**facts, "num_classes": network.num_classes})


def public_name(source: str) -> str:
  """Of weights, for other people: an id on the hub, or a file's name without where it lies."""
  local = pathlib.Path(source).suffix in (".safetensors", *weight_files.TORCH_ENDINGS)
  is_id = not local and not os.path.exists(source) and weight_files.HUB_ID.fullmatch(source)
  return source if is_id else os.path.basename(source.rstrip("/"))


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
  start = config["model"]["pretrained"]
  return {**config,
          "model": {**config["model"], "pretrained": start and public_name(start)},
          "data": {**config["data"], "dir": None},
          "eval": {**config["eval"], "photographs": None},
          "export": {**config["export"], "dir": None}}


def write_classes(workdir: str, names: tuple[str, ...]) -> None:
  """Keeps the names of a run's classes, so that the network can be used where its data is not."""
  write_json(os.path.join(workdir, CLASSES), {"names": list(names)})


def read_classes(workdir: str) -> tuple[str, ...]:
  """What `write_classes` wrote; an InputError where there is nothing."""
  names = read_json(os.path.join(workdir, CLASSES)).get("names")
  if not names:
    raise InputError(f"--workdir={workdir}: its {CLASSES} is missing or not whole; start the "
                     "training command again, which writes it")
  return tuple(names)


def _published(source: str, name: str) -> TrainedNetwork:
  files = weight_files.find(source)
  try:
    facts = _described(files.description)
    if facts["architecture"] not in (None, weights.timm_name(name)):
      raise InputError(f"the weights are those of {facts['architecture']}, not of "
                       f"{weights.timm_name(name)}; give other weights, or another "
                       "config.model.name")
    tensors = weight_files.read_tensors(files.tensors)
    variables = weights.from_state_dict(name, tensors)
    convention = (convention_named(facts["mean"], facts["std"]) if facts["mean"] and facts["std"]
                  else weights.published_convention(name, files.name, tensors))
  except InputError as error:
    if str(error).startswith("config."):
      raise
    raise InputError(f"config.model.pretrained={source!r}: {error}") from error
  classes = weights.num_classes(variables)
  names = facts["label_names"] or (imagenet.WNIDS if classes == len(imagenet.WNIDS) else ())
  return TrainedNetwork(
      name=models.canonical_name(name), variables=variables, input_convention=convention,
      class_names=tuple(map(str, names)) if len(names) == classes else None,
      image_size=facts["input_size"] or models.image_size(name),
      crop_fraction=facts["crop_pct"] or published_crop(models.image_size(name)),
      source=files.name)


def _described(description: dict[str, Any]) -> dict[str, Any]:
  """What timm's JSON says of a network, None for what it does not say.

  Raises:
    InputError: something in it is not of the form that timm writes.
  """
  inner = description.get("pretrained_cfg")
  facts = {**description, **(inner if isinstance(inner, dict) else {})}
  try:
    size = facts.get("input_size")
    crop = facts.get("crop_pct")
    return {
        "architecture": facts.get("architecture"),
        "mean": facts.get("mean") and tuple(map(float, facts["mean"])),
        "std": facts.get("std") and tuple(map(float, facts["std"])),
        "input_size": size and int(size[-1]),
        "crop_pct": crop and _fraction(float(crop)),
        "label_names": tuple(facts.get("label_names") or ())}
  except (TypeError, ValueError, LookupError) as error:
    raise InputError(f"the {weight_files.DESCRIPTION} beside it is not as timm writes it "
                     f"({error}); mend or remove it") from error


def _fraction(value: float) -> float:
  if not 0.1 <= value <= 1:
    raise ValueError(f"a crop_pct of {value:g}")
  return value


def _require_network(source: str, name: str, found: str) -> None:
  if found != models.canonical_name(name):
    raise InputError(f"config.model.pretrained={source!r}: the weights are those of {found}, not "
                     f"of {name}; give {found!r} as config.model.name, or other weights")


def _shapes(model: Network) -> dict[str, Any]:
  return dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))


def _restore(directory: str, wanted: dict[str, Any], which: str = "newest") -> Restored:
  """The arrays of a part of a checkpoint, on the host."""
  with Checkpoints(directory, write=False, best_metric=BEST_METRIC) as checkpoints:
    restored = checkpoints.restore_first(which, wanted, partial=True)
  if restored is None:
    raise InputError(f"there is no checkpoint in {directory!r}; train or export first")
  return dataclasses.replace(restored, state=jax.tree.map(np.asarray, restored.state))
