"""Published weights <-> this project's variables.

timm publishes the AdvProp weights (`timm/tf_efficientnet_b{0..8}.ap_in1k` on the Hugging Face hub),
and most tools read its format: {tensor name: array}, convolution kernels (outputs, inputs / groups,
height, width), dense ones (outputs, inputs). What belongs to what is said once, by the tables of
tensor_names.py; both directions read them.

timm's running variance of a network that PyTorch trained is the unbiased one, this project's the
biased one; the published weights come from TensorFlow and are biased. Numbers are not changed here.
Nor are images: what a network wants to read is its input convention, which comes with the weights
(conventions.py, `published_convention`).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from advprop_jax.errors import InputError
from advprop_jax.models import (
  NAMES,
  architecture_of,
  canonical_name,
  create_model,
  efficientnet,
  tensor_names,
)
from advprop_jax.models.batch_norm import drop_auxiliary, main_path

_SHOWN = 10  # differences that an error message lists
_USUAL_CLASSES = 1000
_ALIKE = 0.9  # share of the tensors, beside the classifier's, that makes two networks alike

# Our leaf -> timm's leaf, in every dialect.
_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}

# Axes of our kernel in timm's order, by the number of axes: (h, w, i, o) -> (o, i, h, w), and
# (i, o) -> (o, i).
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def from_state_dict(name: str, state_dict: Mapping[str, np.ndarray]) -> dict:
  """Variables of a network from published tensors.

  Args:
    name: of the network, as `create_model` takes it.
    state_dict: {tensor name: array}, in any dialect of tensor_names.py; `num_batches_tracked` is
      ignored. The number of classes is the classifier's.

  Returns:
    {"params": ..., "batch_stats": ...} of the network with one domain, float32 numpy arrays.

  Raises:
    InputError: tensors are missing, too many, or have another shape; it names ten at most, and the
      network that they look like.
  """
  tensors = _relevant(state_dict)
  dialect = tensor_names.dialect_of(name, tensors)
  pairs = _pairs_for(name, dialect, tensors)
  wrong = _differences({pair.theirs: pair.their_shape for pair in pairs}, _shapes(tensors))
  if wrong:
    other = None if _likeness(name, _shapes(tensors)) > _ALIKE else looks_like(tensors)
    hint = f"they look like those of {other}: give that as config.model.name; " if other else ""
    raise InputError(f"{hint}{_listed(wrong, name)}")
  ours = {pair.ours: np.asarray(tensors[pair.theirs], np.float32).transpose(pair.inverse)
          for pair in pairs}
  return traverse_util.unflatten_dict(ours)


def to_timm(name: str, variables: Mapping) -> dict[str, np.ndarray]:
  """The timm state dict of a network: what others load. The inverse of `from_state_dict`.

  Args:
    name: of the network, as `create_model` takes it.
    variables: {"params": ..., "batch_stats": ..., ...}, of any domains; the main one is written.

  Returns:
    {timm's tensor name: float32 array}, without `num_batches_tracked`.

  Raises:
    InputError: the variables are not this network's; it names ten differences at most.
  """
  arrays = {path: np.asarray(leaf, np.float32) for path, leaf
            in traverse_util.flatten_dict(drop_auxiliary(variables)).items()}
  bias = arrays.get(("params", "classifier", "bias"))
  pairs = _pairs(canonical_name(name), tensor_names.TIMM, _length(bias))
  wrong = _differences({"/".join(pair.ours): pair.our_shape for pair in pairs},
                       _shapes({"/".join(path): array for path, array in arrays.items()}))
  if wrong:
    raise InputError(_listed(wrong, name))
  return {pair.theirs: np.ascontiguousarray(arrays[pair.ours].transpose(pair.axes))
          for pair in pairs}


def timm_name(name: str) -> str:
  """What timm calls a network, or would if it had it.

  Its EfficientNets without `tf_` are others: of the same tensors, but padded as PyTorch pads, with
  another epsilon in the batch norms.
  """
  name = canonical_name(name)
  return f"tf_{name}" if isinstance(architecture_of(name), efficientnet.Architecture) else name


TIMM_NAMES = tuple(name for name in NAMES if not name.endswith("_tiny"))


def fitted(variables: Mapping, fresh: Mapping,
           keep_classifier: bool = True) -> tuple[dict, bool]:
  """Variables of one network as those of another with more batch norms, or with other classes.

  Args:
    variables: of a network of any domains.
    fresh: of the same network, as it is to be: with its domains and its number of classes.
    keep_classifier: whether the classes are the same, as far as names tell.

  Returns:
    The tree of `fresh` with the values of `variables`: a batch norm of a domain that these lack
    starts as a copy of the main one. And whether the classifier is theirs: for other classes it is
    a fresh one of zeros, so that the loss starts at log(classes) whatever the features are.

  *Source* of the zeros: google-research/vision_transformer, vit_jax/models_vit.py, whose head
  starts so when it is fine-tuned.
  """
  given, result = traverse_util.flatten_dict(variables), {}
  kept = keep_classifier and num_classes(variables) == num_classes(fresh)
  for path, leaf in traverse_util.flatten_dict(fresh).items():
    is_classifier = path[:2] == ("params", "classifier")
    value = given[path] if path in given else given[main_path(path)]
    result[path] = value if kept or not is_classifier else np.zeros(leaf.shape, leaf.dtype)
  return traverse_util.unflatten_dict(result), kept


def num_classes(variables: Mapping) -> int:
  """The number of logits of a network."""
  return len(variables["params"]["classifier"]["bias"])


def looks_like(state_dict: Mapping[str, np.ndarray]) -> str | None:
  """The network whose tensors these are but for a few, whatever the classes; None if there is none.

  It takes some seconds: all networks are made, without computing anything.
  """
  found = _shapes(_relevant(state_dict))
  best, name = max((_likeness(name, found), name) for name in NAMES)
  return name if best > _ALIKE else None


def published_convention(name: str, file: str, state_dict: Mapping) -> str | None:
  """The input convention that weights were trained with, as far as their names tell.

  Args:
    name: of the network.
    file: the name of the weights' file, or their id on the hub.
    state_dict: their tensors.

  Returns:
    A key of CONVENTIONS; None where the name tells nothing, or, of an EfficientNet, not whether the
    weights are those of AdvProp, which read [-1, 1], or others, which read images normalised by
    ImageNet's mean and deviation.

  Raises:
    InputError: they are of timm's EfficientNets without `tf_`.

  *Sources:* timm, models/efficientnet.py and models/resnet.py (default_cfgs); for Lite networks of
  the other dialect, tensorflow/tpu, efficientnet_lite_builder.py, from which they were converted.
  """
  file, name = file.rpartition("/")[2].lower(), canonical_name(name)
  if name.startswith("resnet"):
    return "imagenet" if "resnet" in file else None
  if tensor_names.dialect_of(name, state_dict) == tensor_names.EFFICIENTNET_PYTORCH:
    if "lite" in name:
      return "lite"
  elif file.startswith("efficientnet"):
    raise InputError(f"{file!r} is a name of timm's networks that pad as PyTorch does; give the "
                     f"weights of {timm_name(name)}")
  elif "lite" in name:
    return "inception" if file.startswith("tf_efficientnet_lite") else None
  words = re.split(r"[./_-]", file)
  if {"ap", "adv", "advprop"} & {*words}:
    return "inception"
  plain = re.match(r"(tf_)?efficientnet[-_]b\d-[0-9a-f]{8}\.", file)
  return "imagenet" if plain or {"aa", "ns", "ra", "in1k"} & {*words} else None


@dataclasses.dataclass(frozen=True)
class _Pair:
  """One tensor under both names."""

  ours: tuple[str, ...]
  our_shape: tuple[int, ...]
  theirs: str

  @property
  def axes(self) -> tuple[int, ...]:
    return _AXES[len(self.our_shape)]

  @property
  def inverse(self) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.argsort(self.axes))

  @property
  def their_shape(self) -> tuple[int, ...]:
    return tuple(self.our_shape[axis] for axis in self.axes)


@functools.cache
def _pairs(name: str, dialect: str, classes: int) -> tuple[_Pair, ...]:
  """All tensors of a network with one domain."""
  model, modules = create_model(name, num_classes=classes), tensor_names.module_names(name, dialect)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return tuple(_Pair(path, leaf.shape, f"{modules['/'.join(path[1:-1])]}.{_LEAVES[path[-1]]}")
               for path, leaf in traverse_util.flatten_dict(shapes).items())


def _pairs_for(name: str, dialect: str, tensors: Mapping[str, np.ndarray]) -> tuple[_Pair, ...]:
  classifier = tensor_names.module_names(name, dialect)["classifier"]
  return _pairs(canonical_name(name), dialect, _length(tensors.get(f"{classifier}.bias")))


def _length(bias: np.ndarray | None) -> int:
  """Of the classifier's bias; without one, which is then said to be missing, a usual number."""
  return _USUAL_CLASSES if bias is None or not np.shape(bias) else len(bias)


def _relevant(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {key: value for key, value in state_dict.items()
          if not key.endswith("num_batches_tracked")}


def _likeness(name: str, shapes: Mapping[str, tuple[int, ...]]) -> float:
  """The share of tensors that have a network's names and shapes, beside those of the classifier."""
  found = _without_classifier(shapes)
  pairs = _pairs(canonical_name(name), tensor_names.dialect_of(name, found), _USUAL_CLASSES)
  expected = _without_classifier({pair.theirs: pair.their_shape for pair in pairs})
  common = sum(found.get(key) == shape for key, shape in expected.items())
  return common / max(len(found.keys() | expected.keys()), 1)


def _without_classifier(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  return {key: shape for key, shape in shapes.items()
          if not key.startswith(("classifier.", "fc.", "_fc."))}


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
  return {key: tuple(np.shape(array)) for key, array in arrays.items()}


def _differences(expected: Mapping[str, tuple[int, ...]],
                 found: Mapping[str, tuple[int, ...]]) -> list[str]:
  """What is missing, of another shape, or too much."""
  wrong = [f"{key} is missing, it should be {shape}" for key, shape in expected.items()
           if key not in found]
  wrong += [f"{key} is {found[key]}, it should be {shape}" for key, shape in expected.items()
            if key in found and found[key] != shape]
  return wrong + [f"{key}, {shape}, is not of this network" for key, shape in found.items()
                  if key not in expected]


def _listed(wrong: list[str], name: str) -> str:
  more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
  return f"{len(wrong)} tensors do not fit {name}: {'; '.join(wrong[:_SHOWN])}{more}"
