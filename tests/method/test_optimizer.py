"""Optimizers and schedules against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.method.optimizer import OPTIMIZERS, SCHEDULES, create_optimizer, exponential
from advprop_jax.method.state import update_ema

SETTINGS = {"momentum": 0.9, "nesterov": False, "rms_decay": 0.9, "epsilon": 1e-3, "b1": 0.9,
            "b2": 0.999}


def run(optimizer, params, gradients):
  """Parameters after each update."""
  state, history = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    history.append(params)
  return history


def test_rmsprop_is_tensorflow_s():
  """Fails with epsilon outside the root, an accumulator from zero, or the rate outside momentum."""
  rng = np.random.default_rng(0)
  gradients = rng.normal(size=(40, 3)).astype(np.float32)
  schedule = exponential(0.1, 40, warmup=5, decay_rate=0.5, decay=10)
  w, ms, mom, expected = np.ones(3), np.ones(3), np.zeros(3), []
  for step, g in enumerate(gradients):
    rate = 0.1 * step / 5 if step < 5 else 0.1 * 0.5 ** (step // 10)
    g = g + 0.01 * w  # L2 in the loss
    ms = 0.9 * ms + 0.1 * g**2
    mom = 0.9 * mom + rate * g / np.sqrt(ms + 1e-3)
    w = w - mom
    expected.append(w)
  history = run(create_optimizer("rmsprop", schedule, 0.01, **SETTINGS),
                {"kernel": jnp.ones(3)}, [{"kernel": g} for g in gradients])
  np.testing.assert_allclose([p["kernel"] for p in history], expected, rtol=1e-4)


def test_momentum_sgd_with_decoupled_decay():
  gradients = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
  w, trace, expected = np.ones(3), np.zeros(3), []
  for g in gradients:
    trace = 0.9 * trace + g
    w = w - 0.1 * trace - 0.1 * 0.02 * w
    expected.append(w)
  history = run(create_optimizer("sgd", lambda step: 0.1, 0.02, "decoupled", **SETTINGS),
                {"kernel": jnp.ones(3)}, [{"kernel": g} for g in gradients])
  np.testing.assert_allclose([p["kernel"] for p in history], expected, rtol=1e-4)


def test_adamw_is_optax_s():
  import optax
  gradients = [{"kernel": g} for g in
               np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)]
  ours = run(create_optimizer("adamw", lambda step: 0.1, 0.02, "decoupled", **SETTINGS),
             {"kernel": jnp.ones(3)}, gradients)
  theirs = run(optax.adamw(0.1, eps=1e-3, weight_decay=0.02), {"kernel": jnp.ones(3)}, gradients)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-5)


@pytest.mark.parametrize("form", ["l2", "decoupled"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_no_decay_of_batch_norms(name, form):
  """Fails where a scale or a bias of a batch norm shrinks without a gradient."""
  params = {"conv": {"kernel": jnp.ones(2)},
            "norm": {"scale": jnp.ones(2), "bias_adversarial": jnp.ones(2), "bias": jnp.ones(2)}}
  zeros = jax.tree.map(jnp.zeros_like, params)
  after = run(create_optimizer(name, lambda step: 0.1, 0.1, form, **SETTINGS), params,
              [zeros] * 3)[-1]
  assert np.all(after["conv"]["kernel"] < 1)
  for leaf in jax.tree.leaves(after["norm"]):
    np.testing.assert_array_equal(leaf, 1)


def test_exponential_staircase_counts_from_the_first_step():
  """Fails where the staircase starts after the warm-up."""
  schedule = exponential(1.0, 100, warmup=10, decay_rate=0.5, decay=8)
  steps = jnp.array([0, 5, 9, 10, 15, 16, 24])
  np.testing.assert_allclose(schedule(steps), [0, 0.5, 0.9, 0.5, 0.5, 0.25, 0.125], rtol=1e-6)


def test_cosine():
  schedule = SCHEDULES["cosine"](2.0, 110, warmup=10)
  np.testing.assert_allclose(schedule(jnp.array([0, 5, 10, 60, 110])), [0, 1, 2, 1, 0], atol=1e-6)


def test_constant():
  for warmup, first in ((0, 2.0), (10, 0.0)):
    schedule = SCHEDULES["constant"](2.0, 100, warmup=warmup)
    np.testing.assert_allclose(schedule(jnp.array([0, 10, 99])), [first, 2, 2])


def test_moving_average_ramps_up():
  """decay_t = min(decay, (1 + t) / (10 + t)), t from 1, of parameters and of statistics alike."""
  ema = {"params": {"w": jnp.zeros(2)}, "batch_stats": {"mean": jnp.zeros(2)}}
  expected = 0.0
  for t in range(1, 60):
    decay = min(0.8, (1 + t) / (10 + t))
    expected = decay * expected + (1 - decay) * t
    ema = update_ema(ema, jax.tree.map(lambda x, t=t: jnp.full_like(x, t), ema), jnp.int32(t - 1),
                     0.8)
  for leaf in jax.tree.leaves(ema):
    np.testing.assert_allclose(leaf, expected, rtol=1e-5)
  assert update_ema({}, {"params": {}}, jnp.int32(0), 0.9) == {}
