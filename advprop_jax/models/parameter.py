"""Parameters of flax modules, found without tracing how they would begin."""

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer,
              shape: tuple[int, ...]) -> jax.Array:
  """A float32 parameter, as `module.param` gives it, in a compact method.

  For one that is there flax traces `init` to learn its shape, each time the network is applied: a
  twelfth of what tracing a train step takes.

  Args:
    module: whose parameter it is.
    name: the parameter's; each is used once in a call of the module.
    init: (key, shape, dtype) -> the array that it begins with.
    shape: of the array.

  Raises:
    ValueError: the name is used twice.
    flax.errors.ScopeParamShapeError: it is there, with another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, jnp.float32)
  module.scope.reserve(name, "params")
  value = module.get_variable("params", name)
  if jnp.shape(value) != shape:
    raise errors.ScopeParamShapeError(name, module.scope.path_text, jnp.shape(value), shape)
  return value
