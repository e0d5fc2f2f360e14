"""Dense, pointwise and depthwise convolution: the layers, and how their kernels begin.

All pad as TensorFlow's 'SAME' does (an odd total puts the larger half at the end), a dense one, if
asked, symmetrically as PyTorch's networks do. All hold a float32 `kernel` of shape (height, width,
inputs / groups, outputs), from a normal distribution with standard deviation sqrt(2 / fan_out).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from advprop_jax.models.dense import dense, pointwise
from advprop_jax.models.depthwise import depthwise
from advprop_jax.models.parameter import parameter


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Normal with standard deviation sqrt(2 / fan_out), fan_out = height * width * outputs.

  Args:
    key: a random key.
    shape: of a dense kernel, (height, width, inputs, outputs).
    dtype: type of the result.

  *Source:* tensorflow/tpu, models/official/efficientnet/efficientnet_model.py,
  conv_kernel_initializer.
  """
  return _normal(key, shape, shape[0] * shape[1] * shape[3], dtype)


def depthwise_kernel_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """As `kernel_init`, for a depthwise kernel (height, width, 1, channels).

  Each channel has one output: fan_out = height * width. In the source a depthwise kernel is
  (height, width, channels, 1), and its last axis is what counts as the outputs.
  """
  return _normal(key, shape, shape[0] * shape[1], dtype)


def _normal(key, shape, fan_out, dtype):
  return math.sqrt(2.0 / fan_out) * jax.random.normal(key, shape, dtype)


class Convolution(nn.Module):
  """A dense convolution without bias: (n, h, w, c) -> (n, ceil(h / stride), ..., features).

  Attributes:
    features: channels of the result.
    kernel_size: side of the kernel.
    stride: step between windows, along both axes.
    dtype: type of the computation and of the result.
    symmetric: pads kernel_size // 2 pixels on each side, for an odd kernel_size; else as 'SAME'
      does. The two differ where the stride is not 1.
  """

  features: int
  kernel_size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  symmetric: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = parameter(self, "kernel", kernel_init, shape)
    return dense(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.symmetric)


class Pointwise(nn.Module):
  """A 1 x 1 convolution, as the matrix product that it is: (..., c) -> (..., features).

  Attributes:
    features: channels of the result.
    use_bias: adds a bias that starts at zero.
    dtype: type of the computation and of the result.
  """

  features: int
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = parameter(self, "kernel", kernel_init, (1, 1, x.shape[-1], self.features))
    # Two axes: the weight gradient of more than two copies its input, transposed, on the CPU.
    flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
    y = pointwise(flat, kernel.reshape(kernel.shape[2:]).astype(self.dtype))
    y = y.reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
      y += bias.astype(self.dtype)
    return y


class Depthwise(nn.Module):
  """A depthwise convolution without bias: (n, h, w, c) -> (n, ceil(h / stride), ..., c).

  Attributes:
    kernel_size: side of the kernel.
    stride: step between windows, along both axes.
    dtype: type of the computation and of the result.
  """

  kernel_size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
    kernel = parameter(self, "kernel", depthwise_kernel_init, shape)
    return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
