"""The optax chain, and learning rate schedules over steps.

Source of the recipe: tensorflow/tpu, models/official/efficientnet (utils.py, main.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from advprop_jax.method.loss import decayed

Schedule = Callable[[jax.Array], jax.Array]


def exponential(peak: float, total: float, warmup: float = 0, decay_rate: float = 0.97,
                decay: float = 1) -> Schedule:
  """The learning rate times decay_rate every `decay` steps, in steps, after a linear warm-up.

  The staircase is counted from step 0, not from the end of the warm-up, as in TensorFlow's recipe.
  """
  def schedule(step):
    staircase = peak * decay_rate ** jnp.floor(step / decay)
    return jnp.where(step < warmup, peak * step / max(warmup, 1), staircase)

  return schedule


def cosine(peak: float, total: float, warmup: float = 0, **_) -> Schedule:
  """From 0 to peak in `warmup` steps, then down to 0 at step `total`, along half a cosine."""
  def schedule(step):
    progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
    return jnp.where(step < warmup, peak * step / max(warmup, 1),
                     peak * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

  return schedule


def constant(peak: float, total: float, warmup: float = 0, **_) -> Schedule:
  """From 0 to peak in `warmup` steps, and peak from there on."""
  return lambda step: peak * jnp.minimum(1.0, (step + (warmup == 0)) / max(warmup, 1))


def rmsprop(schedule: Schedule, momentum: float, rms_decay: float, epsilon: float,
            **_) -> optax.GradientTransformation:
  """TensorFlow's RMSProp: epsilon inside the root, the accumulator starts at one, the learning
  rate inside the momentum."""
  return optax.rmsprop(schedule, decay=rms_decay, eps=epsilon, eps_in_sqrt=True,
                       initial_scale=1.0, momentum=momentum)


def sgd(schedule: Schedule, momentum: float, nesterov: bool, **_) -> optax.GradientTransformation:
  """Stochastic gradient descent with momentum."""
  return optax.sgd(schedule, momentum=momentum, nesterov=nesterov)


def adam(schedule: Schedule, b1: float, b2: float, epsilon: float,
         **_) -> optax.GradientTransformation:
  """Adam; with decoupled weight decay this is AdamW (Loshchilov and Hutter, ICLR 2019)."""
  return optax.adam(schedule, b1=b1, b2=b2, eps=epsilon)


def decoupled_decay(schedule: Schedule, weight_decay: float) -> optax.GradientTransformation:
  """Adds -learning rate * weight_decay * parameter to the updates, beside any momentum."""
  def update(updates, state, params):
    factor = schedule(state.count) * weight_decay
    updates = jax.tree.map(lambda u, p: u - factor * p, updates, params)
    return updates, optax.ScaleByScheduleState(state.count + 1)

  return optax.GradientTransformation(
      lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def create_optimizer(name: str, schedule: Schedule, weight_decay: float = 0.0, form: str = "l2",
                     decay_batch_norm: bool = False, trainable: str = "all",
                     **settings) -> optax.GradientTransformation:
  """The optimizer with its weight decay.

  Args:
    name: a key of OPTIMIZERS.
    schedule: step -> learning rate.
    weight_decay: >= 0.
    form: "l2" adds weight_decay * parameter to the gradient, which is 0.5 * weight_decay * |w|^2
      in the loss; "decoupled" shrinks the parameters themselves.
    decay_batch_norm: whether scales and biases of batch norms decay too.
    trainable: one of TRAINABLE; other parameters stay as they are, and have no momenta.
    **settings: momentum, nesterov, rms_decay, epsilon, b1, b2; each optimizer takes its own.
  """
  optimizer = OPTIMIZERS[name](schedule, **settings)

  def mask(params):
    return decayed(params, decay_batch_norm)

  if weight_decay and form == "l2":
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay, mask), optimizer)
  elif weight_decay:
    decay = optax.masked(decoupled_decay(schedule, weight_decay), mask)
    optimizer = optax.chain(optimizer, decay)
  if trainable == "all":
    return optimizer

  def kinds(params):
    return jax.tree.map(lambda stop: "frozen" if stop else "trained", frozen(params, trainable))

  return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, kinds)


def frozen(params: dict, trainable: str) -> dict:
  """A tree of booleans: which parameters are not trained.

  Args:
    params: of a network of this project.
    trainable: one of TRAINABLE.
  """
  no_batch_norm = decayed(params)
  return jax.tree.map_with_path(
      lambda path, other: trainable != "all" and other and path[0].key != "classifier",
      no_batch_norm)


def stop_frozen(params: dict, trainable: str) -> dict:
  """The parameters, those that are not trained without a gradient, which then costs nothing."""
  return jax.tree.map(lambda x, stop: jax.lax.stop_gradient(x) if stop else x, params,
                      frozen(params, trainable))


SCHEDULES = {"exponential": exponential, "cosine": cosine, "constant": constant}
OPTIMIZERS = {"rmsprop": rmsprop, "sgd": sgd, "adamw": adam}
DECAY_FORMS = ("l2", "decoupled")
TRAINABLE = ("all", "norms_and_classifier")
