"""A hundred updates of a real state against TensorFlow's formulas, transcribed to float64 numpy.

*Sources:* tensorflow/tpu, models/official/efficientnet/main.py (loss, order of the updates) and
utils.py (build_learning_rate, build_optimizer); tensorflow, core/kernels/training_ops.cc
(ApplyRMSProp), python/ops/nn_ops.py (l2_loss) and python/training/moving_averages.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import traverse_util

from advprop_jax.experiment import create_method, create_schedule, resolve, training_attack
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import update
from advprop_jax.runtime.config import create_scheme
from configs import imagenet_efficientnet
from tests import one_block

IMAGES = 1281167  # of ImageNet's training set
STEPS, STEPS_PER_EPOCH = 100, 4.7  # warm-up ends in step 23; decays every 11.28 steps


def tensorflow_rate(step, peak, steps_per_epoch, warmup_epochs=5, decay_epochs=2.4, factor=0.97):
  """build_learning_rate."""
  if step < int(warmup_epochs * steps_per_epoch):
    return peak * step / int(warmup_epochs * steps_per_epoch)
  return peak * factor ** math.floor(step / (decay_epochs * steps_per_epoch))


def tensorflow_updates(variables, gradients, statistics, peak, ema_decay):
  """The variables, and their averages, after each update; all are {path: array}."""
  params = {path: np.float64(leaf) for path, leaf in variables.items() if path[0] == "params"}
  square = {path: np.ones_like(leaf) for path, leaf in params.items()}
  momentum = {path: np.zeros_like(leaf) for path, leaf in params.items()}
  averages = {path: np.float64(leaf) for path, leaf in variables.items()}
  for step in range(STEPS):
    rate = tensorflow_rate(step, peak, STEPS_PER_EPOCH)
    for path, w in params.items():
      g = np.float64(gradients[path][step])
      if "norm" not in path[-2]:
        g = g + 1e-5 * w  # of 1e-5 * l2_loss(w) = 1e-5 * sum(w ** 2) / 2
      square[path] += (g**2 - square[path]) * (1 - 0.9)
      momentum[path] = 0.9 * momentum[path] + rate * g / np.sqrt(square[path] + 1e-3)
      params[path] = w - momentum[path]
    updates = step + 1  # the averages are moved after the optimizer has raised the step
    decay = min(ema_decay, (1 + updates) / (10 + updates))
    new = {**params, **{path: np.float64(leaf[step]) for path, leaf in statistics.items()}}
    averages = {path: average - (1 - decay) * (average - new[path])
                for path, average in averages.items()}
    yield {path: leaf.copy() for path, leaf in new.items()}, averages


@pytest.fixture
def recipe():
  """The config of the paper's recipe, with the smallest network."""
  one_block.register()
  config = imagenet_efficientnet.get_config("b0")
  config.model.name = "one_block"
  return ml_collections.ConfigDict(resolve(config))


@pytest.mark.parametrize("ema_decay", [0.9999, 0.8])
def test_a_hundred_updates_are_tensorflow_s(recipe, ema_decay):
  """Parameters, and the averages of parameters and of running statistics, to float error.

  Fails with epsilon outside the root, an accumulator from zero, the rate outside the momentum,
  decay of batch norms or none of biases, decay of w in the place of w / 2 twice, a warm-up that
  shifts the staircase, a ramp that is one update late, or averages of old statistics.
  """
  recipe.train.ema_decay = ema_decay
  schedule = create_schedule(recipe.optimizer, STEPS_PER_EPOCH, STEPS)
  method = create_method(recipe, create_scheme(recipe), 10, schedule,
                         training_attack(recipe, STEPS_PER_EPOCH))
  state = jax.jit(functools.partial(create_train_state, method.model, method.optimizer, 0, 28,
                                    True))()
  flat, rng = traverse_util.flatten_dict(state.variables), np.random.default_rng(0)
  # From so small that weight decay counts to so large that the root's epsilon does not.
  scales = 10 ** rng.uniform(-6, 0.5, len(flat))
  drawn = {path: (scale * rng.normal(size=(STEPS, *leaf.shape))).astype(np.float32)
           for (path, leaf), scale in zip(flat.items(), scales, strict=True)}
  drawn[("params", "classifier", "kernel")] *= 0
  gradients = {path: leaf for path, leaf in drawn.items() if path[0] == "params"}
  statistics = {path: leaf for path, leaf in drawn.items() if path[0] != "params"}

  def step(state, inputs):
    gradient, batch_stats = map(traverse_util.unflatten_dict, inputs)
    state = update(method, state, gradient["params"], batch_stats)
    return state, (state.variables, state.ema)

  new_state, ours = jax.jit(lambda state: jax.lax.scan(step, state, (gradients, statistics)))(
      state)
  assert new_state.step == STEPS
  ours = [traverse_util.flatten_dict(tree) for tree in ours]
  moved = 0
  for i, theirs in enumerate(tensorflow_updates(flat, gradients, statistics,
                                                recipe.optimizer.learning_rate, ema_decay)):
    for mine, expected in zip(ours, theirs, strict=True):
      assert set(mine) == set(expected)
      for path, leaf in expected.items():
        atol = 1e-6 * np.max(np.abs(leaf)) + 1e-12
        np.testing.assert_allclose(mine[path][i], leaf, rtol=2e-5, atol=atol, err_msg=f"{i} {path}")
        moved = max(moved, float(np.max(np.abs(mine[path][i] - mine[path][0]))))
  assert moved > 1


@pytest.mark.parametrize("batch_size", [4096, 2048])
def test_the_learning_rate_of_a_whole_training_is_tensorflow_s(recipe, batch_size):
  """At each step of 350 epochs of ImageNet.

  Fails where the steps of an epoch, of the warm-up or between decays are rounded otherwise: the
  decays would drift by dozens of steps.
  """
  peak = 0.016 * batch_size / 256
  recipe.optimizer.learning_rate = peak
  steps_per_epoch = IMAGES / batch_size
  total = round(350 * steps_per_epoch)
  schedule = jax.jit(create_schedule(recipe.optimizer, steps_per_epoch, total))
  rates = np.asarray(schedule(jnp.arange(total)))
  expected = np.array([tensorflow_rate(step, peak, steps_per_epoch) for step in range(total)])
  # A decay that falls on a step may come one earlier or later, by float32, as TensorFlow's.
  off = ~np.isclose(rates, expected, rtol=1e-4, atol=0)
  assert np.sum(off) <= 2, np.flatnonzero(off)
  assert np.isclose(rates[-1], peak * 0.97**145, rtol=1e-3)
