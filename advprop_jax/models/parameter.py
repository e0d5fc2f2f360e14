"""Parameters of flax modules, found without tracing how they would begin."""

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer,
              shape: tuple[int, ...]) -> jax.Array:
  """A float32 parameter, as `module.param` gives it.

  For one that is there flax traces `init` to learn its shape, each time the network is applied: a
  tenth of what tracing a train step takes.

  Args:
    module: whose parameter it is.
    name: the parameter's.
    init: (key, shape, dtype) -> the array that it begins with.
    shape: of the array.

  Raises:
    flax.errors.ScopeParamShapeError: it is there, with another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, jnp.float32)
  value = module.get_variable("params", name)
  if value.shape != shape:
    raise errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
  return value
