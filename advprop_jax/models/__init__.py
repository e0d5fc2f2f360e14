"""The networks by name: create_model, and what is known of a network before it is made."""

from collections.abc import Sequence

import jax.numpy as jnp

from advprop_jax.errors import InputError
from advprop_jax.models import efficientnet, resnet
from advprop_jax.models.conventions import CONVENTIONS
from advprop_jax.models.network import Network

# name -> (network, its architecture, whose image_size and total_stride are public). A new family
# of networks is one more line.
_NETWORKS = {
    **{name: (efficientnet.EfficientNet, net) for name, net in efficientnet.ARCHITECTURES.items()},
    **{name: (resnet.ResNet, net) for name, net in resnet.ARCHITECTURES.items()},
}

NAMES: tuple[str, ...] = tuple(_NETWORKS)
_DTYPES = ("float32", "bfloat16")


def create_model(name: str, num_classes: int = 1000, domains: Sequence[str] = ("clean",),
                 dtype="float32", share_statistics: bool = False, share_affine: bool = False,
                 axis_name: str | None = None, group_size: int = 1,
                 dropout_rate: float | None = None,
                 drop_path_rate: float | None = None,
                 input_convention: str = "inception", remat: bool = False) -> Network:
  """A network by name, with a bank of batch norms in the place of each batch norm.

  Args:
    name: one of NAMES; timm's prefix `tf_` is allowed.
    num_classes: number of logits.
    domains: names of the domains; the first is the main one.
    dtype: type of the computation, float32 or bfloat16, as a name or a type. Parameters,
      statistics and logits are float32.
    share_statistics: one mean and variance for all domains (an ablation).
    share_affine: one scale and bias for all domains (an ablation).
    axis_name: the pmapped axis; None outside of pmap.
    group_size: neighbouring replicas whose batches are normalised as one.
    dropout_rate: before the classifier; None for the network's own.
    drop_path_rate: stochastic depth; None for the network's own.
    input_convention: what the first convolution reads, a key of CONVENTIONS. Images are given in
      [-1, 1] whatever it is.
    remat: whether a gradient computes what is inside of blocks again, in place of keeping it.

  Returns:
    A module; `apply(variables, images, domains=None, train=False)` gives logits.

  Raises:
    InputError: an unknown name, type or convention.
  """
  network, architecture = _NETWORKS[canonical_name(name)]
  dtype = _checked_dtype(dtype)
  if input_convention not in CONVENTIONS:
    raise InputError(f"input_convention={input_convention!r}: choose one of "
                     f"{', '.join(CONVENTIONS)}")
  return network(architecture, num_classes=num_classes, domains=tuple(domains), dtype=dtype,
                 share_statistics=share_statistics, share_affine=share_affine,
                 axis_name=axis_name, group_size=group_size, dropout_rate=dropout_rate,
                 drop_path_rate=drop_path_rate, input_convention=input_convention, remat=remat)


def canonical_name(name: str) -> str:
  """The name in NAMES of a network that may be named as timm does; else an InputError."""
  canonical = str(name).removeprefix("tf_")
  if canonical not in _NETWORKS:
    raise InputError(f"There is no network {name!r}; there are {', '.join(NAMES)}")
  return canonical


def _checked_dtype(dtype) -> jnp.dtype:
  try:
    known = jnp.dtype(dtype).name in _DTYPES
  except TypeError:  # not the name of any type
    known = False
  if not known:
    raise InputError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
  return jnp.dtype(dtype)


def architecture_of(name: str):
  """What tells a network from the others of its family."""
  return _NETWORKS[canonical_name(name)][1]


def image_size(name: str) -> int:
  """The published resolution of a network: the side of its images in pixels."""
  return architecture_of(name).image_size


def min_image_size(name: str) -> int:
  """The smallest useful side in pixels: the network's total stride, one pixel of features."""
  return architecture_of(name).total_stride
