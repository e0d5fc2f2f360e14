"""Max-pooling, fast on each platform.

TPUs and GPUs take XLA's. On the CPU that takes 2.3 times as long as the maximum of the image's
shifts, and its gradient 15 times as long as comparing them (`tests.benchmarks.convolutions`).
`jax.lax.platform_dependent` chooses when the program is compiled *for* a platform.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from advprop_jax.models.channels import once
from advprop_jax.models.windows import result_size, spread, symmetric_padding, window


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, size: int, stride: int) -> jax.Array:
  """The greatest value of each window, which reaches size // 2 pixels over the image's borders.

  The gradient goes to the first of a window's greatest values, row by row; where that is a NaN, to
  the window's first pixel or, over the border, nowhere. Reverse-mode derivatives only.

  Args:
    x: (n, h, w, c), of a floating type.
    size: of the window, odd.
    stride: along both axes.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), c), of x's type.

  Raises:
    ValueError: size is even.
  """
  if size % 2 == 0:
    raise ValueError(f"size of a max-pool's window: {size}; an odd one is needed")
  return jax.lax.platform_dependent(
      x, cpu=functools.partial(_of_windows, size=size, stride=stride),
      default=functools.partial(_native, size=size, stride=stride))


def _max_pool_forward(x, size, stride):
  y = max_pool(x, size, stride)
  return y, (x, y)


def _max_pool_backward(size, stride, kept, gradient):
  def native(x, y, gradient):
    del y
    return jax.vjp(functools.partial(_native, size=size, stride=stride), x)[1](gradient)[0]

  def by_windows(x, y, gradient):
    first = jnp.zeros(y.shape, jnp.int32)          # of the taps that see the greatest value
    for tap, seen in reversed(list(enumerate(_windows(x, size, stride)))):
      first = jnp.where(seen == y, tap, first)
    first = once(first)
    terms = [[jnp.where(first == size * i + j, gradient, 0) for j in range(size)]
             for i in range(size)]
    return spread(terms, stride, symmetric_padding(size), x.shape)

  return (jax.lax.platform_dependent(*kept, gradient, cpu=by_windows, default=native),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _native(x, size, stride):
  return nn.max_pool(x, (size, size), (stride, stride), symmetric_padding(size))


def _of_windows(x, size, stride):
  return functools.reduce(jnp.maximum, _windows(x, size, stride))


def _windows(x, size, stride):
  """What each tap sees, row by row: size * size times (n, height, width, c)."""
  padded = jnp.pad(x, ((0, 0), *symmetric_padding(size), (0, 0)), constant_values=-jnp.inf)
  shape = result_size(x.shape, stride)
  return [window(padded, i, j, *shape, stride) for i in range(size) for j in range(size)]
