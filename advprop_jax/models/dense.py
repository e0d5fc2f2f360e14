"""Dense convolution, whose gradients are fast on each platform.

They have two forms. On the CPU XLA has one fast routine, for channels last in images and kernels.
The compiled program moves the axes of a gradient to suit it, but only outside of loops: in the loop
of an attack JAX's own gradients of a small ResNet took 8 to 10 times as long (jax 0.10.2). The
CPU's form moves the axes itself. `jax.lax.platform_dependent` chooses when the program is compiled
*for* a platform, so a program for a TPU that is compiled on a CPU host has the TPU's form.
"""

import functools

import jax
import jax.numpy as jnp

from advprop_jax.models.precision import wide
from advprop_jax.models.windows import from_phases, phases_of, same_padding, window

FEW = 4                                # up to so many channels, those of an image


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: jax.Array, kernel: jax.Array, stride: int = 1, symmetric: bool = False) -> jax.Array:
  """Dense convolution, with gradients in the form that is fast on the platform compiled for.

  Reverse-mode derivatives only, as `depthwise`.

  Args:
    x: (n, h, w, c).
    kernel: (k, k, c, features), of x's type.
    stride: along both axes.
    symmetric: pads k // 2 pixels on each side, for an odd k; else as 'SAME' does.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), features), of x's type.
  """
  return _convolve(x, kernel, _dense_padding(x.shape, len(kernel), stride, symmetric),
                   window_strides=(stride, stride))


def _dense_forward(x, kernel, stride, symmetric):
  return dense(x, kernel, stride, symmetric), (x, kernel)


def _dense_backward(stride, symmetric, inputs, gradient):
  def native(x, kernel, gradient):
    padding = _dense_padding(x.shape, len(kernel), stride, symmetric)
    convolve = functools.partial(_convolve, padding=padding, window_strides=(stride, stride))
    return jax.vjp(convolve, x, kernel)[1](gradient)

  def channels_last(x, kernel, gradient):
    size, before = len(kernel), _dense_padding(x.shape, len(kernel), stride, symmetric)
    # Along each axis: the length of the image, and of the gradient spread to the image's steps.
    lengths = [(length, (count - 1) * stride + 1)
               for length, count in zip(x.shape[1:3], gradient.shape[1:3], strict=True)]
    to_image = [(size - 1 - first, length - spread + first)
                for (first, _), (length, spread) in zip(before, lengths, strict=True)]
    to_kernel = [(first, size - 1 - length + spread - first)
                 for (first, _), (length, spread) in zip(before, lengths, strict=True)]
    of_kernel = _convolve(x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), to_kernel,
                          rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)
    if x.shape[3] <= FEW:
      of_x = _few_channels_gradient(wide(gradient), wide(kernel), stride, x.shape, before)
      of_x = of_x.astype(x.dtype)
    else:
      turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
      of_x = _convolve(gradient, turned, to_image, lhs_dilation=(stride, stride))
    return of_x, of_kernel

  return jax.lax.platform_dependent(*inputs, gradient, cpu=channels_last, default=native)


dense.defvjp(_dense_forward, _dense_backward)


def _few_channels_gradient(gradient, kernel, stride, shape, padding):
  """Input gradient of a dense convolution of few channels: one product, and a sum over shifts.

  XLA's fast routine on the CPU does not take results of so few channels: 1.3 to 2 times as long.
  """
  taps, margins = phases_of(kernel, stride, padding)
  height, width = gradient.shape[1:3]
  matrix = jnp.moveaxis(taps, -1, 0).reshape(kernel.shape[3], -1)
  products = (gradient.reshape(-1, gradient.shape[3]) @ matrix).reshape(
      *gradient.shape[:3], *taps.shape[:-1])
  products = jnp.pad(products, ((0, 0), *margins, *[(0, 0)] * 5))
  phases = sum(window(products[:, :, :, i, j], i, j, height, width, 1)
               for i in range(len(taps)) for j in range(taps.shape[1]))
  return from_phases(phases.swapaxes(2, 3), shape)


def _convolve(x, kernel, padding, window_strides=(1, 1), **dilation):
  return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **dilation,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _dense_padding(shape, size, stride, symmetric):
  if symmetric:
    return [(size // 2, size // 2)] * 2
  return [same_padding(length, size, stride) for length in shape[1:3]]
