"""Dense convolution, fast on each platform, and its special case of one pixel.

The dense one has two forms. TPUs and GPUs take XLA's convolution and JAX's gradients of it. On the
CPU XLA has one fast routine, for channels last in images and kernels, which suits neither the few
channels of an image, for which the CPU's form adds up shifts, nor gradients: JAX's own of a small
ResNet took 8 to 10 times as long in the loop of an attack, where XLA does not move their axes (jax
0.10.2), and with them moved, in place of the CPU's matrix products, ResNet-50's steps take 1.04 to
1.07 times as long (tests/benchmarks/README.md). `jax.lax.platform_dependent` chooses when the
program is compiled *for* a platform, so a program for a TPU that is compiled on a CPU host has the
TPU's form.
"""

import functools

import jax
import jax.numpy as jnp

from advprop_jax.models.channels import once
from advprop_jax.models.precision import wide
from advprop_jax.models.windows import (
  apart,
  from_phases,
  phases_of,
  result_size,
  same_padding,
  spread,
  symmetric_padding,
  window,
)

FEW = 4                                # up to so many channels, those of an image
_TAPS = 9 * FEW                        # of a kernel that is added up tap by tap: up to 3 x 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: jax.Array, kernel: jax.Array, stride: int = 1, symmetric: bool = False) -> jax.Array:
  """Dense convolution, in the form that is fast on the platform compiled for.

  Reverse-mode derivatives only, as `depthwise`.

  Args:
    x: (n, h, w, c).
    kernel: (k, k, c, features), of x's type.
    stride: along both axes.
    symmetric: pads k // 2 pixels on each side, for an odd k; else as 'SAME' does.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), features), of x's type.
  """
  padding = _dense_padding(x.shape, len(kernel), stride, symmetric)
  native = functools.partial(_convolve, padding=padding, window_strides=(stride, stride))
  if x.shape[3] > FEW or kernel[..., 0].size > _TAPS:
    return native(x, kernel)
  return jax.lax.platform_dependent(
      x, kernel, cpu=functools.partial(_sum_of_taps, padding=padding, stride=stride),
      default=native)


def _dense_forward(x, kernel, stride, symmetric):
  return dense(x, kernel, stride, symmetric), (x, kernel)


def _dense_backward(stride, symmetric, inputs, gradient):
  shape, size = inputs[0].shape, len(inputs[1])
  padding = _dense_padding(shape, size, stride, symmetric)
  input_gradient = _few_channels_gradient if shape[3] <= FEW else _many_channels_gradient

  def native(x, kernel, gradient):
    convolve = functools.partial(_convolve, padding=padding, window_strides=(stride, stride))
    return jax.vjp(convolve, x, kernel)[1](gradient)

  def products(x, kernel, gradient):
    of_x = input_gradient(wide(gradient), wide(kernel), stride, shape, padding)
    of_kernel = _kernel_gradient(wide(gradient), wide(x), stride, size, padding)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)

  return jax.lax.platform_dependent(*inputs, gradient, cpu=products, default=native)


dense.defvjp(_dense_forward, _dense_backward)


def _sum_of_taps(x, kernel, padding, stride):
  """A sum over the kernel's taps, each times one channel of the shifted image, in float32.

  A quarter to 0.4 of the time of XLA's routine for 27 taps, but 4 times as long for 147.
  """
  size, taps = len(kernel), wide(kernel)
  height, width = result_size(x.shape, stride)

  def convolve(x):
    x = jnp.pad(wide(x), ((0, 0), *padding, (0, 0)))
    return sum(window(x[..., c:c + 1], i, j, height, width, stride) * taps[i, j, c]
               for i in range(size) for j in range(size) for c in range(x.shape[3]))

  return apart(convolve, x, kernel).astype(x.dtype)


def _kernel_gradient(gradient, x, stride, size, padding):
  """Weight gradient of a dense convolution: a product for each row of the kernel.

  0.5 to 0.7 of the time of XLA's routine for the few channels of an image; for many 0.6 to 0.7 with
  64 and 512 channels of ResNet-50, 0.9 to 1.25 between (`tests.benchmarks.convolutions`).
  """
  height, width = gradient.shape[1:3]
  if x.shape[3] > FEW:                 # or XLA makes the rows in the forward pass, and keeps them
    x, gradient = jax.lax.optimization_barrier((x, gradient))
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  rows = jnp.concatenate([x[:, :, j:j + (width - 1) * stride + 1:stride] for j in range(size)], -1)
  flat = gradient.reshape(-1, gradient.shape[3])
  products = [
      _weight_gradient(rows[:, i:i + (height - 1) * stride + 1:stride].reshape(len(flat), -1), flat)
      for i in range(size)]
  return jnp.stack(products).reshape(size, size, x.shape[3], -1)


def _many_channels_gradient(gradient, kernel, stride, shape, padding):
  """Input gradient of a dense convolution: a product for each tap, and a sum over their shifts.

  0.4 to 0.5 of the time of XLA's routine, for which the kernel has to be turned round, with 512
  channels of ResNet-50, 0.7 to 1.2 with fewer (`tests.benchmarks.convolutions`).
  """
  flat = gradient.reshape(-1, gradient.shape[3])
  terms = [[once(flat @ tap.T).reshape(*gradient.shape[:3], -1) for tap in row] for row in kernel]
  return spread(terms, stride, padding, shape)


def _few_channels_gradient(gradient, kernel, stride, shape, padding):
  """Input gradient of a dense convolution of few channels: one product, and a sum over shifts.

  XLA's fast routine on the CPU does not take results of so few channels: 1.2 to 5 times as long.
  The product's pixels come last, or the sum would be over the few channels: 1.3 times as long.
  """
  taps, margins = phases_of(kernel, stride, padding)
  height, width = gradient.shape[1:3]
  gradient = jnp.pad(gradient, ((0, 0), *margins, (0, 0)))
  products = taps.reshape(-1, kernel.shape[3]) @ gradient.reshape(-1, kernel.shape[3]).T
  products = products.reshape(*taps.shape[:-1], *gradient.shape[:3])
  phases = sum(products[i, j, ..., i:i + height, j:j + width]
               for i in range(len(taps)) for j in range(taps.shape[1]))
  phases = jax.lax.optimization_barrier(phases)      # (phases, phases, c, n, h, w)
  return from_phases(phases.transpose(3, 4, 0, 5, 1, 2), shape)


def _convolve(x, kernel, padding, window_strides):
  return jax.lax.conv_general_dilated(x, kernel, window_strides, padding,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _dense_padding(shape, size, stride, symmetric):
  if symmetric:
    return symmetric_padding(size)
  return [same_padding(length, size, stride) for length in shape[1:3]]


@jax.custom_vjp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A 1 x 1 convolution, as the matrix product that it is. Reverse-mode derivatives only.

  Args:
    x: (pixels, c), those of all images.
    kernel: (c, features), of x's type.

  Returns:
    (pixels, features), of x's type.
  """
  return x @ kernel


def _pointwise_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _pointwise_backward(inputs, gradient):
  x, kernel = inputs
  return gradient @ kernel.T, _weight_gradient(x, gradient)


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _weight_gradient(x, gradient):
  """x.T @ gradient, of (pixels, c) and (pixels, features), in the form that the CPU is fast in."""
  if len(x) > x.shape[1] > gradient.shape[1]:
    # XLA's product on the CPU is slow where the wider one of the two is transposed, if there are
    # many pixels: 1.3 to 2.4 times as long. `once`, or XLA would make x.T @ gradient of it.
    return once(gradient.T @ x).T
  return x.T @ gradient
