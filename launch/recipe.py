"""What is to be planned: a config, resolved for a slice, without its data."""

import dataclasses
import importlib.util
import pathlib
import re

import ml_collections

from advprop_jax.errors import InputError
from advprop_jax.experiment import open_split, resolve
from advprop_jax.runtime.config import create_scheme, duration
from launch import slices

IMAGENET = (1000, 1_281_167)           # classes, training images
DATA = {"imagenet2012": IMAGENET, "imagenet_folder": IMAGENET}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is to be compiled: a config on a slice, and as much of its data as the step depends on.

  Attributes:
    config: resolved, for the slice's devices.
    slice: to compile for.
    num_classes: of the data.
    num_images: to train on.
  """

  config: ml_collections.FrozenConfigDict
  slice: slices.Slice
  num_classes: int
  num_images: int

  @property
  def at_once(self) -> int:
    """Images of a chip's micro-batch."""
    return self.config.data.batch_size // (self.slice.chips * self.config.train.accumulation)

  @property
  def total_steps(self) -> int:
    """Updates of the whole training."""
    scheme = create_scheme(self.config)
    steps = self.num_images / self.config.data.batch_size
    return duration(self.config.train, "", steps / scheme.budget if scheme.same_budget else steps)


def make_recipe(config, slice_: slices.Slice, classes: int | None = None,
                images: int | None = None) -> Recipe:
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
  return Recipe(config, slice_, classes, images)


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
