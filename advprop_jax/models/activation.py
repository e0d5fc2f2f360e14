"""Swish, whose gradient keeps nothing but its input."""

import jax
import jax.numpy as jnp

from advprop_jax.models.precision import wide


@jax.custom_vjp
def swish(x: jax.Array) -> jax.Array:
  """x * sigmoid(x), elementwise.

  JAX's own gradient also keeps the sigmoid, which is one more array of the image's size to write
  and to read: on the CPU these two, and not the arithmetic, are what it costs. Reverse-mode
  derivatives only.

  *Source:* Ramachandran et al., "Searching for Activation Functions", arXiv 1710.05941.
  """
  return x * jax.nn.sigmoid(x)


def _forward(x):
  return swish(x), x


def _backward(x, gradient):
  # Two things are for XLA on the CPU, which by default drops barriers. The sigmoid is written by
  # another function than above, or it would be one of both, kept. And it waits for the gradient, or
  # those of all layers would be computed first, and kept: 0 * gradient is not simplified, as a
  # gradient that is not finite makes it nan.
  dtype = x.dtype                      # of which bfloat16 would lose all where x is below -5
  x, gradient = wide(x), wide(gradient)
  sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * (x + 0 * gradient))
  return ((gradient * (sigmoid * (1 + x * (1 - sigmoid)))).astype(dtype),)


swish.defvjp(_forward, _backward)
