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

# On the CPU: how many pieces of images are added up elementwise for the weight gradient, and from
# how many values on one image is as many pieces.
_PIECES = 16
LARGE = 50_000


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
  taps = wide(kernel)

  def convolve(images):
    images = _padded(images, size, stride)
    return sum(window(images, i, j, height, width, stride) * taps[i, j, 0]
               for i in range(size) for j in range(size))

  return apart(convolve, x, kernel).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("stride", "shape"))
def _shifted_input_gradient(gradient, kernel, stride, shape):
  """A sum over shifts of the gradient, for all phases of the image at once."""
  padding = [same_padding(length, len(kernel), stride) for length in shape[1:3]]
  taps, margins = phases_of(wide(kernel), stride, padding)
  height, width = result_size(shape, stride)

  def convolve(gradient):
    gradient = jnp.pad(wide(gradient), ((0, 0), *margins, (0, 0)))
    phases = sum(window(gradient, i, j, height, width, 1)[:, :, None, :, None]
                 * taps[i, j, :, None, :, 0]
                 for i in range(len(taps)) for j in range(taps.shape[1]))
    return from_phases(phases, shape)

  return apart(convolve, gradient, kernel)


@functools.partial(jax.jit, static_argnames=("stride", "shape"))
def _shifted_kernel_gradient(gradient, x, stride, shape):
  """Per tap: the channels' inner products of the gradient and the shifted image.

  A few images at a time, or one large one, so that all taps find them in the cache. XLA's reduction
  of a 4-d window is slow on the CPU: pieces of equal size are added up elementwise, and a matrix
  product does the rest.
  """
  size, (height, width) = shape[0], result_size(x.shape, stride)
  large, bands = height * width * shape[3] > LARGE, bands_of(height, width, shape[3])
  rows, images = height // bands, 1 if large else _PIECES

  def tap(x, gradient, i, j):
    products = sum(
        window(image, i + band * rows * stride, j, rows, width, stride)
        * window(of_image, band * rows, 0, rows, width, 1)
        for image, of_image in zip(x, gradient, strict=True)
        for band in range(bands)).reshape(-1, shape[3])
    return (jnp.ones((1, len(products)), products.dtype) @ products)[0]

  def add(total, group):
    if large:  # or XLA takes the image out of the batch again in two of the taps: 10 times as long
      group = jax.lax.optimization_barrier([of_group[None] for of_group in group])
    # Image by image, (1, h, w, c) each.
    x = jnp.split(_padded(group[0], size, stride), images)
    gradient = jnp.split(wide(group[1]), images)
    return total + jnp.stack([tap(x, gradient, i, j)
                              for i in range(size) for j in range(size)]), None

  zeros = jnp.zeros((size * size, shape[3]), jnp.promote_types(x.dtype, jnp.float32))
  groups = (x, gradient) if large else (_groups(x, images), _groups(gradient, images))
  total, _ = jax.lax.scan(add, zeros, groups)
  return total.reshape(shape)


def bands_of(height: int, width: int, channels: int) -> int:
  """How many bands of rows a result of this size is cut into for the weight gradient."""
  if height * width * channels <= LARGE:
    return 1
  return max(n for n in range(1, _PIECES + 1) if height % n == 0)


def _groups(x, images):
  """(n, ...) -> (groups, images of a group, ...), filled up with zeros."""
  missing = -len(x) % images
  if missing:
    x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
  return x.reshape(-1, images, *x.shape[1:])


def _padded(x, size, stride):
  """The images in float32, padded as 'SAME' wants it."""
  padding = [same_padding(length, size, stride) for length in x.shape[1:3]]
  return jnp.pad(wide(x), ((0, 0), *padding, (0, 0)))
