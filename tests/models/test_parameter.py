"""Parameters of modules: they begin once, and are what a module is applied to."""

import jax
import jax.numpy as jnp
import pytest
from flax import errors
from flax import linen as nn

from advprop_jax.models.parameter import parameter

asked = []                             # of how a parameter begins


def threes(key, shape, dtype):
  asked.append((shape, dtype))
  return jnp.full(shape, 3, dtype)


class Scale(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x * parameter(self, "scale", threes, x.shape)


class Twice(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x * parameter(self, "scale", threes, x.shape) * parameter(self, "scale", threes, x.shape)


class TwiceCalled(nn.Module):
  @nn.compact
  def __call__(self, x):
    scale = Scale()
    return scale(scale(x))


def test_a_parameter_begins_once():
  """Fails where it is traced again how it begins, or a module is applied to another value."""
  asked.clear()
  variables = Scale().init(jax.random.key(0), jnp.ones(2))
  assert jax.tree.map(lambda x: x.tolist(), variables) == {"params": {"scale": [3, 3]}}
  assert asked == [((2,), jnp.float32)]
  assert Scale().apply({"params": {"scale": jnp.array([4.0, 5.0])}}, jnp.ones(2)).tolist() == [4, 5]
  assert len(asked) == 1


@pytest.mark.parametrize(("variables", "error"), [
    ({"params": {"scale": jnp.ones(3)}}, errors.ScopeParamShapeError),
    ({"params": {"scale": 3.0}}, errors.ScopeParamShapeError),
    ({"params": {"bias": jnp.ones(2)}}, errors.ScopeParamNotFoundError),
    ({}, errors.ScopeCollectionNotFound),
])
def test_parameters_of_another_network(variables, error):
  """Fails where a module is applied to what does not fit it, or does not say which it is."""
  with pytest.raises(error, match="scale"):
    Scale().apply(variables, jnp.ones(2))


def test_a_name_is_used_once():
  """Fails where two parameters of one name are one, at the start or later."""
  with pytest.raises(ValueError, match="scale"):
    Twice().init(jax.random.key(0), jnp.ones(2))
  with pytest.raises(ValueError, match="scale"):
    Twice().apply({"params": {"scale": jnp.ones(2)}}, jnp.ones(2))


def test_a_module_that_is_called_twice():
  """Fails where the second call begins another parameter, or is refused."""
  variables = TwiceCalled().init(jax.random.key(0), jnp.ones(2))
  assert jax.tree.map(lambda x: x.tolist(), variables) == {"params": {"Scale_0": {"scale": [3, 3]}}}
  assert TwiceCalled().apply(variables, jnp.ones(2)).tolist() == [9, 9]
