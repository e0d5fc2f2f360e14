"""The type that sums over images are taken in, whatever the network computes in."""

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jax.Array:
  """x in float32, or in float64 where x has it."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
