"""What a train step takes and gives back."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from advprop_jax.models.network import Network


@flax.struct.dataclass
class TrainState:
  """The whole state of training; with the same state, every later number is the same.

  Attributes:
    step: number of updates made, int32.
    params: the network's weights, with scale and bias of every domain.
    batch_stats: running statistics of every domain: {"batch_stats": ..., "batch_stats_<domain>":
      ...}, each a collection of the model.
    ema: moving averages of the variables, {"params": ..., "batch_stats": ..., ...}; empty where
      none is kept.
    opt_state: the optimizer's.
    key: the run's one random key, uint32 (2,); never changes, a step folds its number in.
  """

  step: jax.Array
  params: dict
  batch_stats: dict
  ema: dict
  opt_state: Any
  key: jax.Array

  @property
  def variables(self) -> dict:
    """The model's variables as they are trained."""
    return {"params": self.params, **self.batch_stats}

  @property
  def evaluation_variables(self) -> dict:
    """The variables to be evaluated and kept: the moving averages, where there are any."""
    return self.ema or self.variables


def create_train_state(model: Network, optimizer: optax.GradientTransformation, seed: int,
                       image_size: int, ema: bool) -> TrainState:
  """A fresh state.

  Args:
    model: a network of this project.
    optimizer: the optax chain.
    seed: of the weights and of all that training draws.
    image_size: height and width, pixels.
    ema: whether moving averages are kept.
  """
  init_key, key = jax.random.split(jax.random.PRNGKey(seed))
  variables = model.init(init_key, jnp.zeros((1, image_size, image_size, 3)))
  batch_stats = {name: value for name, value in variables.items() if name != "params"}
  return TrainState(step=jnp.zeros((), jnp.int32), params=variables["params"],
                    batch_stats=batch_stats, ema=variables if ema else {},
                    opt_state=optimizer.init(variables["params"]), key=key)


def update_ema(ema: dict, variables: dict, step: jax.Array, decay: float) -> dict:
  """Moving averages after one more update; early ones follow faster.

  decay_t = min(decay, (1 + t) / (10 + t)), with t = 1, 2, ... the number of updates made, this one
  included: TensorFlow reads the step after the optimizer has raised it.

  Args:
    ema: the averages so far; none are kept where it is empty.
    variables: of the same structure, after this update.
    step: number of updates before this one.
    decay: in [0, 1).

  *Source:* tensorflow, python/training/moving_averages.py, ExponentialMovingAverage.apply, under a
  control dependency on the train op in tensorflow/tpu, models/official/efficientnet/main.py.
  """
  if not ema:
    return ema
  updates = step + 1
  decay = jnp.minimum(decay, (1 + updates) / (10 + updates))
  return optax.incremental_update(variables, ema, 1 - decay)
