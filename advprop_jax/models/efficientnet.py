"""EfficientNet B0-B8, EfficientNet-Lite and a tiny one for small images, with a bank in each norm.

*Source:* Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019, arXiv 1905.11946; the numbers are those of tensorflow/tpu, models/official/efficientnet
(efficientnet_builder.py, efficientnet_model.py and lite/efficientnet_lite_builder.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from advprop_jax.models.activation import swish
from advprop_jax.models.batch_norm import BatchNorm
from advprop_jax.models.channels import scale_channels
from advprop_jax.models.convolution import Convolution, Depthwise, Pointwise
from advprop_jax.models.dropout import Dropout
from advprop_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class Stage:
  """Blocks in a row; the first one has the stride and changes the channels."""

  repeats: int
  kernel_size: int
  stride: int
  expansion: int
  inputs: int
  outputs: int


@dataclasses.dataclass(frozen=True)
class Architecture:
  """All that tells one EfficientNet from another.

  Attributes:
    image_size: the published resolution, side in pixels.
    stages: the blocks.
    stem: channels of the first convolution.
    head: channels of the last one.
    dropout_rate: before the classifier.
    drop_path_rate: stochastic depth of a block behind the last; it grows linearly from 0.
    stem_stride: stride of the first convolution.
    squeeze_excite: width of the squeeze, as a share of the *inputs of the block*; 0 for none.
    activation: all over the network.
    norm_momentum: of the running statistics; lower for a network that trains for few steps.
  """

  image_size: int
  stages: tuple[Stage, ...]
  stem: int
  head: int
  dropout_rate: float
  drop_path_rate: float = 0.2
  stem_stride: int = 2
  squeeze_excite: float = 0.25
  activation: Callable[[jax.Array], jax.Array] = swish
  norm_momentum: float = 0.99

  @property
  def total_stride(self) -> int:
    """Pixels of the image, along one axis, for each pixel of the last feature map."""
    return self.stem_stride * math.prod(stage.stride for stage in self.stages)


_BASE = (
    Stage(1, 3, 1, 1, 32, 16),
    Stage(2, 3, 2, 6, 16, 24),
    Stage(2, 5, 2, 6, 24, 40),
    Stage(3, 3, 2, 6, 40, 80),
    Stage(3, 5, 1, 6, 80, 112),
    Stage(4, 5, 2, 6, 112, 192),
    Stage(1, 3, 1, 6, 192, 320),
)

# Width, depth, resolution, dropout.
_SCALES = {
    "efficientnet_b0": (1.0, 1.0, 224, 0.2),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4),
    "efficientnet_b5": (1.6, 2.2, 456, 0.4),
    "efficientnet_b6": (1.8, 2.6, 528, 0.5),
    "efficientnet_b7": (2.0, 3.1, 600, 0.5),
    "efficientnet_b8": (2.2, 3.6, 672, 0.5),
}

# Resolutions of the authors' table; timm's port evaluates Lite3 at 300 and Lite4 at 380.
_LITE_SCALES = {
    "efficientnet_lite0": (1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": (1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": (1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": (1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": (1.4, 1.8, 300, 0.3),
}

# Not a published network: B0's blocks for images of 28 to 64 pixels on a CPU. Full resolution has
# few channels, and most parameters are where the feature map is 4 x 4.
_TINY = Architecture(
    image_size=28, stem=16, stem_stride=1, head=256, dropout_rate=0.2, drop_path_rate=0.1,
    norm_momentum=0.9,
    stages=(
        Stage(1, 3, 2, 1, 16, 16),
        Stage(1, 3, 2, 4, 16, 24),
        Stage(2, 3, 1, 4, 24, 40),
        Stage(1, 3, 2, 4, 40, 80),
        Stage(2, 3, 1, 4, 80, 96),
    ))


def round_filters(filters: int, width: float) -> int:
  """Channels times width, to the nearest multiple of 8 that is not below 90 % of the product.

  *Source:* tensorflow/tpu, efficientnet_model.py, round_filters.
  """
  scaled = filters * width
  rounded = max(8, int(scaled + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * scaled else rounded


def _scaled(width: float, depth: float, image_size: int, dropout_rate: float) -> Architecture:
  stages = tuple(dataclasses.replace(
      stage, repeats=math.ceil(depth * stage.repeats), inputs=round_filters(stage.inputs, width),
      outputs=round_filters(stage.outputs, width)) for stage in _BASE)
  return Architecture(image_size, stages, stem=round_filters(32, width),
                      head=round_filters(1280, width), dropout_rate=dropout_rate)


def _lite(width: float, depth: float, image_size: int, dropout_rate: float) -> Architecture:
  """No squeeze-excite, ReLU6; stem and head are not scaled, nor the depth of the outer stages."""
  full = _scaled(width, depth, image_size, dropout_rate)
  ends = {0: _BASE[0].repeats, len(_BASE) - 1: _BASE[-1].repeats}
  stages = [dataclasses.replace(stage, repeats=ends.get(i, stage.repeats))
            for i, stage in enumerate(full.stages)]
  stages[0] = dataclasses.replace(stages[0], inputs=32)
  return dataclasses.replace(full, stages=tuple(stages), stem=32, head=1280, squeeze_excite=0.0,
                             activation=nn.relu6)


ARCHITECTURES = {
    **{name: _scaled(*scale) for name, scale in _SCALES.items()},
    **{name: _lite(*scale) for name, scale in _LITE_SCALES.items()},
    "efficientnet_tiny": _TINY,
}


class SqueezeExcite(nn.Module):
  """Scales each channel by what the pooled image says.

  *Source:* Hu et al., CVPR 2018, arXiv 1709.01507.
  """

  squeezed: int
  activation: Callable[[jax.Array], jax.Array]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(Pointwise, use_bias=True, dtype=self.dtype)
    pooled = jnp.mean(x, (1, 2), keepdims=True)
    squeezed = self.activation(dense(self.squeezed, name="reduce")(pooled))
    return scale_channels(x, nn.sigmoid(dense(x.shape[-1], name="expand")(squeezed)))


class Block(nn.Module):
  """MBConv: expand, filter each channel, squeeze-excite, project; a skip where shapes allow.

  Attributes:
    stage: kernel, stride, expansion and channels of *this* block.
    squeezed: channels of the squeeze; 0 for no squeeze-excite.
    drop_rate: probability that the residual branch of an image is dropped.
    norm: makes a bank of batch norms.
    drop: makes a dropout layer.
    activation: after the first two norms.
    dtype: of the computation.
  """

  stage: Stage
  squeezed: int
  drop_rate: float
  norm: Callable[..., BatchNorm]
  drop: Callable[..., Dropout]
  activation: Callable[[jax.Array], jax.Array]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, domains: Sequence[str], train: bool) -> jax.Array:
    stage, inputs = self.stage, x
    if stage.expansion != 1:
      x = Pointwise(stage.inputs * stage.expansion, dtype=self.dtype, name="expand")(x)
      x = self.activation(self.norm(name="expand_norm")(x, domains, train))
    x = Depthwise(stage.kernel_size, stage.stride, self.dtype, name="depthwise")(x)
    x = self.activation(self.norm(name="depthwise_norm")(x, domains, train))
    if self.squeezed:
      x = SqueezeExcite(self.squeezed, self.activation, self.dtype, name="squeeze_excite")(x)
    x = Pointwise(stage.outputs, dtype=self.dtype, name="project")(x)
    x = self.norm(name="project_norm")(x, domains, train)
    if stage.stride != 1 or stage.inputs != stage.outputs:
      return x
    return inputs + self.drop(self.drop_rate, whole_image=True)(x, domains)


def _classifier_init(key, shape, dtype=jnp.float32):
  """Uniform in +-1 / sqrt(classes). *Source:* tensorflow/tpu, dense_kernel_initializer."""
  limit = 1 / math.sqrt(shape[1])
  return jax.random.uniform(key, shape, dtype, -limit, limit)


class EfficientNet(Network):
  """An EfficientNet; `architecture` says which."""

  norm_epsilon = 1e-3
  classifier_init = staticmethod(_classifier_init)

  def features(self, images, domains, train, norm, drop):
    net, blocks = self.architecture, block_names(self.architecture)
    x = Convolution(net.stem, 3, net.stem_stride, self.dtype, name="stem")(images)
    x = net.activation(norm(name="stem_norm")(x, domains, train))
    # Survival is 1 - rate * block / blocks: tensorflow/tpu, efficientnet_model.py, Model.call.
    rates = self.drop_rates(range(len(blocks)), len(blocks))
    block = self.block(Block)
    for (name, _, _, stage), rate in zip(blocks, rates, strict=True):
      x = block(stage, int(net.squeeze_excite * stage.inputs), rate, norm, drop, net.activation,
                self.dtype, name=name)(x, domains, train)
    x = Pointwise(net.head, dtype=self.dtype, name="head")(x)
    return net.activation(norm(name="head_norm")(x, domains, train))


def block_names(architecture: Architecture) -> list[tuple[str, int, int, Stage]]:
  """(name, stage's index, index within the stage, the stage as this block has it), in order."""
  blocks = []
  for s, stage in enumerate(architecture.stages):
    later = dataclasses.replace(stage, stride=1, inputs=stage.outputs)
    blocks += [(f"stage_{s + 1}_block_{b + 1}", s, b, later if b else stage)
               for b in range(stage.repeats)]
  return blocks
