"""What all networks share: the banks that they are made of, and the way from features to logits."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from advprop_jax.models.batch_norm import BatchNorm
from advprop_jax.models.channels import once
from advprop_jax.models.conventions import normalised
from advprop_jax.models.dropout import Dropout


class Network(nn.Module):
  """A network whose every batch norm is a bank. A family of networks defines `features`.

  Attributes:
    architecture: which one of the family: has norm_momentum, dropout_rate and drop_path_rate.
    num_classes: number of logits.
    domains: names of the domains; the first is the main one.
    dtype: type of the computation; parameters, statistics and logits are float32.
    share_statistics: one mean and variance for all domains.
    share_affine: one scale and bias for all domains.
    axis_name: the pmapped axis; None outside of pmap.
    group_size: neighbouring replicas whose batches are normalised as one.
    dropout_rate: None for the architecture's own.
    drop_path_rate: None for the architecture's own.
    input_convention: what the first convolution reads, a key of CONVENTIONS.
    remat: whether a gradient keeps the inputs of each block alone, and computes the rest again.
  """

  architecture: Any
  num_classes: int = 1000
  domains: tuple[str, ...] = ("clean",)
  dtype: jnp.dtype = jnp.float32
  share_statistics: bool = False
  share_affine: bool = False
  axis_name: str | None = None
  group_size: int = 1
  dropout_rate: float | None = None
  drop_path_rate: float | None = None
  input_convention: str = "inception"
  remat: bool = False

  # Of the family.
  norm_epsilon: ClassVar[float]
  classifier_init: ClassVar[Callable[..., jax.Array]]

  @nn.compact
  def __call__(self, images: jax.Array, domains: Sequence[str] | None = None,
               train: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      images: (n, h, w, 3), in [-1, 1].
      domains: whose images they are, in that order, in equal parts; None for the main one.
      train: whether banks normalise by the statistics of this batch. Dropout and stochastic depth
        do not depend on it: they are on where rngs={"dropout": key} is given.

    Returns:
      Logits, (n, num_classes), float32.

    Raises:
      ValueError: a domain that the model lacks or that is named twice, or parts that are not equal.
    """
    net, domains = self.architecture, tuple(domains or self.domains[:1])
    norm = functools.partial(
        BatchNorm, domains=self.domains, momentum=net.norm_momentum, epsilon=self.norm_epsilon,
        dtype=self.dtype, share_statistics=self.share_statistics, share_affine=self.share_affine,
        axis_name=self.axis_name, group_size=self.group_size)
    drop = functools.partial(Dropout, domains=self.domains, axis_name=self.axis_name)

    x = self.features(normalised(images, self.input_convention), domains, train, norm, drop)
    x = once(x)     # or the CPU's library makes the last activation, slowly, within the mean
    x = jnp.mean(x.astype(jnp.float32), (1, 2))
    x = drop(_own(net.dropout_rate, self.dropout_rate))(x, domains)
    return nn.Dense(self.num_classes, kernel_init=self.classifier_init, name="classifier")(x)

  def features(self, images: jax.Array, domains: Sequence[str], train: bool,
               norm: Callable[..., BatchNorm], drop: Callable[..., Dropout]) -> jax.Array:
    """The last feature map, (n, h', w', channels).

    Args:
      images: (n, h, w, 3), in [-1, 1].
      domains: whose images they are.
      train: for the banks.
      norm: makes a bank of batch norms.
      drop: makes a dropout layer.
    """
    raise NotImplementedError

  def block(self, block: type[nn.Module]) -> type[nn.Module]:
    """A family's block, called with (x, domains, train), as `remat` has it.

    Variables, their names and the masks of dropout are the same either way.

    *Source:* Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """
    return nn.remat(block, static_argnums=(2, 3)) if self.remat else block  # self is argument 0

  def drop_rates(self, before: Sequence[int], blocks: int) -> list[float]:
    """Of stochastic depth, growing with the number of blocks `before` one, of so many."""
    rate = _own(self.architecture.drop_path_rate, self.drop_path_rate)
    return [rate * i / blocks for i in before]


def _own(rate, given):
  return rate if given is None else given
