"""Sums over images and pixels, channel by channel, fast on each platform.

On the CPU XLA gives such a sum to a library, which takes 1.3 to 2 times as long as when
neighbouring pixels are added up elementwise before it, and of a product 2 to 3 times. TPUs and
GPUs take XLA's sums: `jax.lax.platform_dependent` chooses when the program is compiled *for* a
platform.
"""

import math

import jax
import jax.numpy as jnp

from advprop_jax.models.precision import wide

_TOGETHER = 8                          # at most so many pixels are added up in one operation


@jax.jit
def channel_sums(x: jax.Array) -> jax.Array:
  """The sums over all axes but the first and the last: (a, ..., channels) -> (a, channels).

  Args:
    x: float32 or float64; of narrower types the partial sums would be rounded.
  """
  return jax.lax.platform_dependent(x, cpu=_sums_of_neighbours, default=_plain_sums)


def _plain_sums(x):
  return jnp.sum(x, tuple(range(1, x.ndim - 1)))


def _sums_of_neighbours(x):
  """A few neighbours at a time, and a matrix product for the few that are left.

  XLA on the CPU may fuse two sums, which then take 3 to 8 times as long; it fuses no matrix product
  with the sum before it.
  """
  pixels = math.prod(x.shape[1:-1])
  together = max(n for n in range(1, _TOGETHER + 1) if pixels % n == 0)
  if together == 1:                    # such as 17 x 17
    return _plain_sums(x)
  x = x.reshape(x.shape[0], pixels // together, together, x.shape[-1])
  x = sum(x[:, :, i] for i in range(together))
  return (jnp.ones((x.shape[0], 1, x.shape[1]), x.dtype) @ x)[:, 0]


@jax.jit
def once(x: jax.Array) -> jax.Array:
  """x, which the CPU computes once and keeps, and not again in each operation that reads it.

  It does where XLA keeps barriers: runtime/xla_flags.py.
  """
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_vjp
def scale_channels(x: jax.Array, scale: jax.Array) -> jax.Array:
  """x * scale, with the scale's gradient by `channel_sums`: in float32, whatever x is.

  JAX's own sums bfloat16 in bfloat16 on the CPU, where 4,096 ones make 1,024. Reverse-mode
  derivatives only.

  Args:
    x: (n, h, w, channels).
    scale: (n, 1, 1, channels), of x's type.
  """
  return x * scale


def _scale_forward(x, scale):
  return x * scale, (x, scale)


def _scale_backward(inputs, gradient):
  x, scale = inputs
  of_scale = channel_sums(wide(gradient) * wide(x)).reshape(scale.shape)
  return gradient * scale, of_scale.astype(scale.dtype)


scale_channels.defvjp(_scale_forward, _scale_backward)
