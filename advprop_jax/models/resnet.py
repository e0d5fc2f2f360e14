"""ResNet-50, 101, 152 and 200, and a tiny one for small images, with a bank in each norm.

Version 1.5: where a bottleneck halves the image, its 3 x 3 convolution has the stride, and not the
1 x 1 before it. Convolutions and the max-pool pad symmetrically, as timm's and torchvision's do.

*Source:* He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385;
repeats of ResNet-200: "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv 1603.05027
(its blocks here are those of the others). Names and padding: timm, timm/models/resnet.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from advprop_jax.models.batch_norm import BatchNorm
from advprop_jax.models.convolution import Convolution, Pointwise
from advprop_jax.models.dropout import Dropout
from advprop_jax.models.network import Network
from advprop_jax.models.pooling import max_pool


@dataclasses.dataclass(frozen=True)
class Architecture:
  """All that tells one ResNet from another.

  Attributes:
    image_size: the published resolution, side in pixels.
    repeats: blocks of each stage. All stages but the first halve the image and double the channels.
    stem: channels of the first convolution, and of the 3 x 3 convolutions of the first stage.
    bottleneck: blocks of 1 x 1, 3 x 3, 1 x 1 with four times the channels; else of two 3 x 3.
    small_images: a 3 x 3 stem; else 7 x 7 with stride 2, and a 3 x 3 max-pool with stride 2.
    dropout_rate: before the classifier.
    drop_path_rate: stochastic depth of the last block.
    zero_init_residual: the last scale of each residual branch starts at 0, so that each block
      starts as its shortcut (Goyal et al., arXiv 1706.02677, section 5.1); else at 1.
    norm_momentum: of the running statistics.
  """

  image_size: int
  repeats: tuple[int, ...]
  stem: int = 64
  bottleneck: bool = True
  small_images: bool = False
  dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  zero_init_residual: bool = True
  norm_momentum: float = 0.9

  @property
  def total_stride(self) -> int:
    """Pixels of the image, along one axis, for each pixel of the last feature map."""
    return (1 if self.small_images else 4) * 2 ** (len(self.repeats) - 1)


ARCHITECTURES = {
    "resnet50": Architecture(224, (3, 4, 6, 3)),
    "resnet101": Architecture(224, (3, 4, 23, 3)),
    "resnet152": Architecture(224, (3, 8, 36, 3)),
    "resnet200": Architecture(224, (3, 24, 36, 3)),
    # He et al., section 4.2, with n = 2 (14 layers), but with projections for shortcuts.
    "resnet_tiny": Architecture(32, (2, 2, 2), stem=16, bottleneck=False, small_images=True),
}


class Block(nn.Module):
  """A residual branch of two or three convolutions, added to the shortcut.

  Attributes:
    channels: of the 3 x 3 convolutions.
    stride: of the first 3 x 3 convolution, and of the shortcut.
    bottleneck: as in Architecture.
    drop_rate: probability that the residual branch of an image is dropped.
    last_scale_init: of the last batch norm in the residual branch.
    norm: makes a bank of batch norms.
    drop: makes a dropout layer.
    dtype: of the computation.
  """

  channels: int
  stride: int
  bottleneck: bool
  drop_rate: float
  last_scale_init: nn.initializers.Initializer
  norm: Callable[..., BatchNorm]
  drop: Callable[..., Dropout]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, domains: Sequence[str], train: bool) -> jax.Array:
    layers, inputs = self._layers(), x
    for i, layer in enumerate(layers, 1):
      last = i == len(layers)
      settings = {"scale_init": self.last_scale_init} if last else {}
      x = self.norm(name=f"norm_{i}", **settings)(layer(x), domains, train)
      x = x if last else nn.relu(x)
    shortcut = inputs
    if self.stride != 1 or inputs.shape[-1] != x.shape[-1]:
      shortcut = Pointwise(x.shape[-1], dtype=self.dtype, name="shortcut")(
          inputs[:, ::self.stride, ::self.stride])
      shortcut = self.norm(name="shortcut_norm")(shortcut, domains, train)
    return nn.relu(shortcut + self.drop(self.drop_rate, whole_image=True)(x, domains))

  def _layers(self):
    conv = functools.partial(Convolution, self.channels, 3, symmetric=True, dtype=self.dtype)
    if not self.bottleneck:
      return [conv(stride=self.stride, name="conv_1"), conv(name="conv_2")]
    return [Pointwise(self.channels, dtype=self.dtype, name="conv_1"),
            conv(stride=self.stride, name="conv_2"),
            Pointwise(4 * self.channels, dtype=self.dtype, name="conv_3")]


class ResNet(Network):
  """A ResNet; `architecture` says which."""

  norm_epsilon = 1e-5
  # *Source:* tensorflow/tpu, models/official/resnet/resnet_model.py; Goyal et al., section 5.1.
  classifier_init = staticmethod(nn.initializers.normal(0.01))

  def features(self, images, domains, train, norm, drop):
    net, blocks = self.architecture, block_names(self.architecture)
    last_scale_init = nn.initializers.zeros if net.zero_init_residual else nn.initializers.ones

    size, stride = (3, 1) if net.small_images else (7, 2)
    x = Convolution(net.stem, size, stride, self.dtype, symmetric=True, name="stem")(images)
    x = nn.relu(norm(name="stem_norm")(x, domains, train))
    if not net.small_images:
      x = max_pool(x, size=3, stride=2)
    # Block l of L is dropped with probability rate * l / L. *Source:* Huang et al., ECCV 2016,
    # equation 4. (An EfficientNet, as its source, counts from 0 and never reaches the rate.)
    rates = self.drop_rates(range(1, len(blocks) + 1), len(blocks))
    block = self.block(Block)
    for (name, s, b), rate in zip(blocks, rates, strict=True):
      x = block(net.stem * 2 ** s, 2 if s > 0 and b == 0 else 1, net.bottleneck, rate,
                last_scale_init, norm, drop, self.dtype, name=name)(x, domains, train)
    return x


def block_names(architecture: Architecture) -> list[tuple[str, int, int]]:
  """(name, stage's index, index within the stage) of each block, in order."""
  return [(f"stage_{s + 1}_block_{b + 1}", s, b)
          for s, repeats in enumerate(architecture.repeats) for b in range(repeats)]
