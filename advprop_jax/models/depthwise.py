"""Depthwise convolution, fast on each platform.

It has two forms. TPUs and GPUs take XLA's grouped convolution. On the CPU that one is 6 to 100
times slower than a sum of shifted copies of the image, each times its row of the kernel, which XLA
turns into one vectorised loop. `jax.lax.platform_dependent` chooses when the program is compiled
*for* a platform, so a program for a TPU that is compiled on a CPU host has the TPU's form.
"""

import functools

import jax
import jax.numpy as jnp

from advprop_jax.models.precision import wide
from advprop_jax.models.windows import (
  apart,
  from_phases,
  phases_of,
  result_size,
  same_padding,
  window,
)

# On the CPU: how many pieces of images at most are added up elementwise for the weight gradient,
# and from how many values on an image counts as large; up to how many numbers a kernel stays in a
# core's first cache, and how many channels at most make a block of one that does not.
_PIECES = 16
_LARGE = 50_000
_SMALL_KERNEL = 8192
_BLOCK = 48


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Depthwise convolution, 'SAME', in the form that is fast on the platform compiled for.

  Reverse-mode derivatives only (`jax.grad`, `jax.vjp`, nested or not; not `jax.jvp`).

  Args:
    x: (n, h, w, c).
    kernel: (k, k, 1, c), of x's type.
    stride: along both axes.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), c), of x's type.
  """
  return jax.lax.platform_dependent(
      x, kernel, cpu=functools.partial(depthwise_shifted, stride=stride),
      default=functools.partial(depthwise_native, stride=stride))


def _depthwise_forward(x, kernel, stride):
  return depthwise(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, inputs, gradient):
  def native(x, kernel, gradient):
    return jax.vjp(functools.partial(depthwise_native, stride=stride), x, kernel)[1](gradient)

  def shifted(x, kernel, gradient):
    return (_shifted_input_gradient(gradient, kernel, stride, x.shape).astype(x.dtype),
            _shifted_kernel_gradient(gradient, x, stride, kernel.shape).astype(kernel.dtype))

  return jax.lax.platform_dependent(*inputs, gradient, cpu=shifted, default=native)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`depthwise` as XLA's grouped convolution: the form for TPU and GPU."""
  return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), "SAME", feature_group_count=x.shape[-1],
      dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.jit, static_argnames="stride")
def depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`depthwise` as a sum over the kernel's taps, in float32: the form for the CPU."""
  size = len(kernel)
  height, width = result_size(x.shape, stride)

  def convolve(images, taps):
    images = _padded(images, size, stride)
    return sum(window(images, i, j, height, width, stride) * taps[i, j, 0]
               for i in range(size) for j in range(size))

  return _by_channels(convolve, x, wide(kernel), kernel).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("stride", "shape"))
def _shifted_input_gradient(gradient, kernel, stride, shape):
  """A sum over shifts of the gradient, for all phases of the image at once."""
  padding = [same_padding(length, len(kernel), stride) for length in shape[1:3]]
  taps, margins = phases_of(wide(kernel), stride, padding)
  height, width = result_size(shape, stride)

  def convolve(gradient, taps):
    gradient = jnp.pad(wide(gradient), ((0, 0), *margins, (0, 0)))
    phases = sum(window(gradient, i, j, height, width, 1)[:, :, None, :, None]
                 * taps[i, j, :, None, :, 0]
                 for i in range(len(taps)) for j in range(taps.shape[1]))
    return from_phases(phases, shape)

  return _by_channels(convolve, gradient, taps, kernel)


def _by_channels(convolve, x, taps, kernel):
  """convolve(x, taps), computed once and kept; of a large kernel a few channels at a time.

  What is read again at each pixel is the kernel. With one that the first cache does not hold all
  this takes 1.3 to 2 times as long, although by blocks the result is copied once more.
  """
  channels = taps.shape[-1]
  block = block_of(taps.size // channels, channels)
  if block == channels:
    return apart(lambda x: convolve(x, taps), x, kernel)

  def split(x):
    return jnp.moveaxis(x.reshape(*x.shape[:-1], channels // block, block), -2, 0)

  def whole(x):
    blocks = apart(lambda x: jax.vmap(convolve)(split(x), split(taps)), x, kernel)
    return jnp.moveaxis(blocks, 0, -2).reshape(*blocks.shape[1:-1], channels)

  return apart(whole, x, kernel)         # or what reads the result would be the one to join blocks


def block_of(taps: int, channels: int) -> int:
  """How many channels of a kernel of so many taps per channel are taken at a time.

  All, too, where no number from 16 to 48 divides them; that is slower, and nothing else.
  """
  if taps * channels <= _SMALL_KERNEL:
    return channels
  return max((n for n in range(16, _BLOCK + 1, 8) if channels % n == 0), default=channels)


@functools.partial(jax.jit, static_argnames=("stride", "shape"))
def _shifted_kernel_gradient(gradient, x, stride, shape):
  """Per tap: the channels' inner products of the gradient and the shifted image.

  A few images at a time, so that all taps find them in the cache. XLA's reduction of a 4-d window
  is slow on the CPU: pieces of equal size are added up elementwise, and a matrix product does the
  rest.
  """
  size, (height, width) = shape[0], result_size(x.shape, stride)
  images, bands = pieces_of(len(x), height, width, shape[3])
  rows = height // bands

  def tap(x, gradient, i, j):
    # `lax`, as here Python's operators would take a twentieth of the time to trace a train step.
    products = functools.reduce(jax.lax.add, [
        jax.lax.mul(window(image, i + band * rows * stride, j, rows, width, stride),
                    window(of_image, band * rows, 0, rows, width, 1))
        for image, of_image in zip(x, gradient, strict=True)
        for band in range(bands)]).reshape(-1, shape[3])
    return (jnp.ones((1, len(products)), products.dtype) @ products)[0]

  def add(total, first):
    group, of_group = (jax.lax.dynamic_slice_in_dim(batch, first, images) for batch in batches)
    # Without the barrier XLA takes the images out of the batch again in two of the taps, which then
    # take 10 times as long.
    group, of_group = jax.lax.optimization_barrier((_padded(group, size, stride), wide(of_group)))
    pair = jnp.split(group, images), jnp.split(of_group, images)       # image by image
    return total + jnp.stack([tap(*pair, i, j) for i in range(size) for j in range(size)]), None

  batches = _filled(x, images), _filled(gradient, images)
  zeros = jnp.zeros((size * size, shape[3]), jnp.promote_types(x.dtype, jnp.float32))
  total, _ = jax.lax.scan(add, zeros, jnp.arange(0, len(batches[0]), images))
  return total.reshape(shape)


def pieces_of(batch: int, height: int, width: int, channels: int) -> tuple[int, int]:
  """For weight gradients of results of this size: images at a time, and bands of rows of each."""
  if height * width * channels <= _LARGE:
    return min(_PIECES, batch), 1
  images = 1 if batch % 2 else 2       # large images are not copied to fill up the batch
  return images, max(n for n in range(1, _PIECES // images + 1) if height % n == 0)


def _filled(x, images):
  """The batch, filled up with zeros to a multiple of so many images."""
  missing = -len(x) % images
  return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x


def _padded(x, size, stride):
  """The images in float32, padded as 'SAME' wants it."""
  padding = [same_padding(length, size, stride) for length in x.shape[1:3]]
  return jnp.pad(wide(x), ((0, 0), *padding, (0, 0)))
