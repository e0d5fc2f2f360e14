"""Dropout and stochastic depth: how often, of what, and the same in one pass or two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.models.dropout import Dropout

DOMAINS = ("clean", "adversarial")
KEY = {"dropout": jax.random.key(3)}


def apply(layer, x, domains=("clean",), rngs=None):
  return layer.apply({}, x, domains, rngs=rngs)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rate_and_scale_of_dropout(rate):
  y = apply(Dropout(rate), jnp.ones((64, 500)), rngs=KEY)
  # The mean of 32,000 draws has a standard deviation below 0.003.
  assert np.mean(y == 0) == pytest.approx(rate, abs=0.012)
  np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)


def test_stochastic_depth_drops_whole_images():
  """Fault: one draw for the batch, or one for each value."""
  y = np.asarray(apply(Dropout(0.2, whole_image=True), jnp.ones((4000, 3, 3, 2)), rngs=KEY))
  kept = y[:, 0, 0, 0] != 0
  np.testing.assert_array_equal(y, np.broadcast_to(kept[:, None, None, None] / 0.8, y.shape)
                                .astype(np.float32))
  assert np.mean(~kept) == pytest.approx(0.2, abs=0.025)


@pytest.mark.parametrize("whole_image", [False, True])
def test_one_pass_of_two_domains_is_two_passes(whole_image):
  layer = Dropout(0.5, domains=DOMAINS, whole_image=whole_image)
  clean, adversarial = jnp.ones((16, 4, 4, 3)), 2 * jnp.ones((16, 4, 4, 3))
  both = apply(layer, jnp.concatenate([clean, adversarial]), DOMAINS, rngs=KEY)
  parts = [apply(layer, clean, ("clean",), rngs=KEY),
           apply(layer, adversarial, ("adversarial",), rngs=KEY)]
  np.testing.assert_array_equal(both, jnp.concatenate(parts))
  assert np.any((parts[0] == 0) != (parts[1] == 0))  # each domain has masks of its own


def test_without_a_key_nothing_is_dropped():
  x = jnp.ones((4, 3))
  assert apply(Dropout(0.9), x) is x
  assert apply(Dropout(0.0), x, rngs=KEY) is x


def test_type_is_kept():
  assert apply(Dropout(0.5), jnp.ones((4, 3), jnp.bfloat16), rngs=KEY).dtype == jnp.bfloat16
