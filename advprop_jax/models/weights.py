"""Published weights <-> this project's variables.

timm publishes the AdvProp weights (`timm/tf_efficientnet_b{0..8}.ap_in1k` on the Hugging Face hub),
and most tools read its format: {tensor name: array}, convolution kernels (outputs, inputs / groups,
height, width), dense ones (outputs, inputs). What belongs to what is said once, by the tables
below; both directions read them.

timm's running variance of a network that PyTorch trained is the unbiased one, this project's the
biased one; the published weights come from TensorFlow and are biased. Numbers are not changed here.
Nor are images: ResNets from elsewhere mostly want them normalised by ImageNet's mean and deviation,
not in [-1, 1].
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from advprop_jax.errors import InputError
from advprop_jax.models import canonical_name, create_model, efficientnet, resnet
from advprop_jax.models.batch_norm import drop_auxiliary

_SHOWN = 10  # differences that an error message lists

# Our module -> timm's module.
_EFFICIENTNET = {
    "stem": "conv_stem",
    "stem_norm": "bn1",
    "head": "conv_head",
    "head_norm": "bn2",
    "classifier": "classifier",
}
_SQUEEZE_EXCITE = {
    "squeeze_excite/reduce": "se.conv_reduce",
    "squeeze_excite/expand": "se.conv_expand",
}
_BLOCK = {
    "expand": "conv_pw",
    "expand_norm": "bn1",
    "depthwise": "conv_dw",
    "depthwise_norm": "bn2",
    "project": "conv_pwl",
    "project_norm": "bn3",
    **_SQUEEZE_EXCITE,
}
_BLOCK_WITHOUT_EXPANSION = {
    "depthwise": "conv_dw",
    "depthwise_norm": "bn1",
    "project": "conv_pw",
    "project_norm": "bn2",
    **_SQUEEZE_EXCITE,
}
_RESNET = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "classifier": "fc",
}
_RESNET_BLOCK = {
    "conv_1": "conv1",
    "norm_1": "bn1",
    "conv_2": "conv2",
    "norm_2": "bn2",
    "conv_3": "conv3",
    "norm_3": "bn3",
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}

# Our leaf -> timm's leaf.
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


def from_timm(name: str, state_dict: Mapping[str, np.ndarray]) -> dict:
  """Variables of a network from a timm state dict.

  Args:
    name: of the network, as `create_model` takes it.
    state_dict: {timm's tensor name: array}; `num_batches_tracked` is ignored. The number of
      classes is the classifier's.

  Returns:
    {"params": ..., "batch_stats": ...} of the network with one domain, float32 numpy arrays.

  Raises:
    InputError: tensors are missing, too many, or have another shape; it names ten at most.
  """
  tensors = {key: np.asarray(value, np.float32) for key, value in state_dict.items()
             if not key.endswith("num_batches_tracked")}
  classifier = _modules(name)["classifier"]
  pairs = _pairs(canonical_name(name), _num_classes(tensors, f"{classifier}.bias"))
  _check(name, {pair.theirs: pair.their_shape for pair in pairs}, tensors)
  ours = {pair.ours: tensors[pair.theirs].transpose(pair.inverse) for pair in pairs}
  return traverse_util.unflatten_dict(ours)


def to_timm(name: str, variables: Mapping) -> dict[str, np.ndarray]:
  """The timm state dict of a network: what others load. The inverse of `from_timm`.

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
  pairs = _pairs(canonical_name(name), _num_classes(arrays, ("params", "classifier", "bias")))
  _check(name, {"/".join(pair.ours): pair.our_shape for pair in pairs},
         {"/".join(path): array for path, array in arrays.items()})
  return {pair.theirs: arrays[pair.ours].transpose(pair.axes) for pair in pairs}


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
def _pairs(name: str, num_classes: int) -> tuple[_Pair, ...]:
  """All tensors of a network with one domain."""
  model = create_model(name, num_classes=num_classes)
  modules = _modules(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return tuple(_Pair(path, leaf.shape, f"{modules['/'.join(path[1:-1])]}.{_LEAVES[path[-1]]}")
               for path, leaf in traverse_util.flatten_dict(shapes).items())


def _num_classes(arrays: Mapping, bias: str | tuple[str, ...]) -> int:
  """The length of the classifier's bias; without one, which `_check` then says, a usual number."""
  return len(arrays[bias]) if bias in arrays else 1000


def _modules(name: str) -> dict[str, str]:
  """{our module: timm's module}, of every module that the network may have."""
  architecture = create_model(name).architecture
  return dict(_MODULES[type(architecture)](architecture))


def _efficientnet_modules(
    architecture: efficientnet.Architecture) -> Iterator[tuple[str, str]]:
  yield from _EFFICIENTNET.items()
  for block, stage_index, block_index, stage in efficientnet.block_names(architecture):
    table = _BLOCK_WITHOUT_EXPANSION if stage.expansion == 1 else _BLOCK
    for ours, theirs in table.items():
      yield f"{block}/{ours}", f"blocks.{stage_index}.{block_index}.{theirs}"


def _resnet_modules(architecture: resnet.Architecture) -> Iterator[tuple[str, str]]:
  yield from _RESNET.items()
  for block, stage_index, block_index in resnet.block_names(architecture):
    for ours, theirs in _RESNET_BLOCK.items():
      yield f"{block}/{ours}", f"layer{stage_index + 1}.{block_index}.{theirs}"


# A new family of networks is one more line.
_MODULES = {
    efficientnet.Architecture: _efficientnet_modules,
    resnet.Architecture: _resnet_modules,
}


def _check(name: str, expected: Mapping[str, tuple[int, ...]],
           found: Mapping[str, np.ndarray]) -> None:
  """Raises an InputError that lists what is missing, too much or of another shape."""
  wrong = [f"{key} is missing, it should be {shape}" for key, shape in expected.items()
           if key not in found]
  wrong += [f"{key} is {found[key].shape}, it should be {shape}" for key, shape in expected.items()
            if key in found and found[key].shape != shape]
  wrong += [f"{key}, {array.shape}, is not of this network" for key, array in found.items()
            if key not in expected]
  if wrong:
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise InputError(f"{len(wrong)} tensors do not fit {name}: {'; '.join(wrong[:_SHOWN])}{more}")
