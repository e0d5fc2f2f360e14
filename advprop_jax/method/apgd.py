"""APGD-CE: an attack whose step size follows the loss, for evaluation. It has nothing to be tuned.

Gradient ascent with momentum. At checkpoints, ever closer to each other, each image is looked at:
where the loss has hardly risen since the last one, the step size is halved, and the ascent goes on
from the best point so far. The first step, 2 epsilon, crosses the ball.

*Source:* Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, Algorithm 1; and fra31/auto-attack, autoattack/autopgd_base.py,
which is followed wherever it is not what the paper says, since published figures are its figures:
the checkpoints are rounded otherwise (`windows`), condition 1 has <= in the place of <, and the
first loss of all is compared with 0 instead of the start's. Units are those of attack.py.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax.method.attack import PIXEL, Attack, ascend, project
from advprop_jax.method.loss import cross_entropy

MOMENTUM = 0.25  # 1 - alpha
RHO = 0.75       # the share of steps that raise the loss, if the step size is right

Logits = Callable[[jax.Array], jax.Array]


class Ascent(NamedTuple):
  """Where the attack on each image is. Scalars of an image are (n,), images (n, h, w, 3)."""

  x: jax.Array
  previous: jax.Array        # where the last step began
  step_size: jax.Array       # 0-255 units
  adversarial: jax.Array     # the last point that was misclassified
  fooled: jax.Array          # whether there is one
  best: jax.Array            # the point of the highest loss,
  best_gradient: jax.Array   # its gradient
  best_loss: jax.Array       # and its loss
  loss: jax.Array            # of the last point
  rises: jax.Array           # steps since the last checkpoint that raised the loss
  checked_loss: jax.Array    # best_loss at the last checkpoint
  halved: jax.Array          # whether the step size was halved there


def apgd(logits_of: Logits, labels: jax.Array, images: jax.Array, keys: jax.Array, *,
         epsilon: jax.typing.ArrayLike, num_steps: int, norm: str = "linf") -> jax.Array:
  """Adversarial images of APGD on the cross entropy, from a random start.

  Args:
    logits_of: images (n, h, w, 3) -> logits (n, classes) of the network in question, where no image
      plays a part in the logits of another.
    labels: (n,), the true ones.
    images: (n, h, w, 3), in [-1, 1].
    keys: (n, ...), a random key for each image.
    epsilon: radius of the ball round each image, 0-255 units, >= 0; may be traced, so that one
      program serves all strengths.
    num_steps: >= 0, static; num_steps + 1 gradients are computed.
    norm: "linf", or "l2" over all values of an image.

  Returns:
    (n, h, w, 3), in [-1, 1] exactly, and in the ball: exactly for "linf", to float32 for "l2". For
    each image: itself, if it is misclassified; else the last point of the attack that is; else the
    point of the highest loss. No gradient flows back through them.
  """
  images = jax.lax.stop_gradient(images)
  start = random_start(images, keys, epsilon, norm)
  return apgd_from(start, logits_of, labels, images, epsilon, num_steps, norm)


def apgd_from(start: jax.Array, logits_of: Logits, labels: jax.Array, images: jax.Array,
              epsilon: jax.typing.ArrayLike, num_steps: int, norm: str) -> jax.Array:
  """As `apgd`, from a given start, (n, h, w, 3), that is in the ball and in [-1, 1]."""
  ball = Attack(norm=norm, epsilon=epsilon)
  lengths = jnp.asarray(windows(num_steps))

  def loss_fn(x):
    logits = logits_of(x)
    losses = cross_entropy(logits, labels)
    return jnp.sum(losses), (losses, _wrong(logits, labels))

  def one_round(i, ascent):
    gradient, (losses, wrong) = jax.grad(loss_fn, has_aux=True)(ascent.x)
    ascent = record(ascent, gradient, losses, wrong)
    ascent = ascent._replace(  # the start is no rise, and the authors take its loss for 0
        rises=jnp.where(i == 0, 0, ascent.rises), loss=jnp.where(i == 0, 0, ascent.loss))
    ascent, gradient = check(ascent, gradient, lengths[i])
    return move(ascent, gradient, images, ball, jnp.where(i == 0, 0, MOMENTUM))

  # Points and gradients are evaluated in one place, so that the network is compiled once. The last
  # round's step is thrown away.
  ascent = jax.lax.fori_loop(0, num_steps + 1, one_round, begin(start, epsilon))
  result = _where(ascent.fooled, ascent.adversarial, ascent.best)
  result = _where(_wrong(logits_of(images), labels), images, result)
  return jax.lax.stop_gradient(result)


def random_start(images: jax.Array, keys: jax.Array, epsilon: jax.typing.ArrayLike,
                 norm: str) -> jax.Array:
  """The images with noise that reaches the border of the ball, cut off at [-1, 1].

  "linf": uniform noise, scaled until its largest value is epsilon; "l2": uniform on the sphere.
  """
  def draw(key):
    if norm == "linf":
      noise = jax.random.uniform(key, images.shape[1:], jnp.float32, -1, 1)
      return noise / jnp.max(jnp.abs(noise))
    noise = jax.random.normal(key, images.shape[1:])
    return noise / jnp.linalg.norm(noise.ravel())

  noise = PIXEL * epsilon * jax.vmap(draw)(keys)
  return project(images + noise, images, Attack(norm=norm, epsilon=epsilon))


def windows(num_steps: int) -> np.ndarray:
  """Where the checkpoints are: (num_steps + 1,) integers, for the points x_0 ... x_num_steps.

  At a checkpoint the number of steps since the one before, or since the start; elsewhere 0. The
  first is at 22 % of num_steps; each window is by 3 % shorter than the last, and none is below 6 %.
  These are rounded down to whole steps one by one, and are at least 1. (The paper sums them up as
  fractions, and rounds the sums up: the same for 100 steps, not for 20.)
  """
  def steps(percentage):
    return max(percentage * num_steps // 100, 1)

  lengths = np.zeros(num_steps + 1, np.int32)
  length = at = steps(22)
  while at <= num_steps:
    lengths[at] = length
    length = max(length - steps(3), steps(6))
    at += length
  return lengths


def begin(start: jax.Array, epsilon: jax.typing.ArrayLike) -> Ascent:
  """The ascent before anything is known. Thus condition 2 does not hold at the first checkpoint."""
  n = len(start)
  lowest, no = jnp.full(n, -jnp.inf), jnp.zeros(n, bool)
  return Ascent(
      x=start, previous=start, step_size=jnp.full(n, 2 * epsilon, jnp.float32),
      adversarial=start, fooled=no, best=start, best_gradient=jnp.zeros_like(start),
      best_loss=lowest, loss=lowest, rises=jnp.zeros(n, jnp.int32), checked_loss=lowest, halved=no)


def record(ascent: Ascent, gradient: jax.Array, losses: jax.Array, wrong: jax.Array) -> Ascent:
  """Remembers what is now known of x: the loss's gradient, the losses, who is misclassified."""
  better = losses > ascent.best_loss
  return ascent._replace(
      adversarial=_where(wrong, ascent.x, ascent.adversarial), fooled=ascent.fooled | wrong,
      best=_where(better, ascent.x, ascent.best),
      best_gradient=_where(better, gradient, ascent.best_gradient),
      best_loss=jnp.where(better, losses, ascent.best_loss),
      loss=losses, rises=ascent.rises + (losses > ascent.loss))


def check(ascent: Ascent, gradient: jax.Array, length: jax.Array) -> tuple[Ascent, jax.Array]:
  """A checkpoint, if length, the number of steps since the last one, is not 0.

  The step size is halved, and x is the best point again, where one of these holds:
    1. no more than RHO of the steps have raised the loss;
    2. the best loss is the one of the last checkpoint, and the step size was not halved then.

  Returns:
    The ascent, and the gradient at its x.
  """
  due = length > 0
  halve = (ascent.rises <= RHO * length) | (
      ~ascent.halved & (ascent.checked_loss >= ascent.best_loss))
  back = due & halve
  checked = ascent._replace(
      x=_where(back, ascent.best, ascent.x),
      step_size=jnp.where(back, ascent.step_size / 2, ascent.step_size),
      rises=jnp.where(due, 0, ascent.rises), halved=jnp.where(due, halve, ascent.halved),
      checked_loss=jnp.where(due, ascent.best_loss, ascent.checked_loss))
  return checked, _where(back, ascent.best_gradient, gradient)


def move(ascent: Ascent, gradient: jax.Array, images: jax.Array, ball: Attack,
         momentum: jax.typing.ArrayLike) -> Ascent:
  """One step: up the gradient, projected, mixed with the step before, projected."""
  x = ascent.x
  step = dataclasses.replace(ball, step_size=ascent.step_size.reshape(-1, 1, 1, 1))
  uphill = ascend(x, gradient, images, step) - x
  mixed = x + (1 - momentum) * uphill + momentum * (x - ascent.previous)
  return ascent._replace(x=project(mixed, images, ball), previous=x)


def _wrong(logits, labels):
  return jnp.argmax(logits, axis=-1) != labels


def _where(condition, images, others):
  """For each image the one or the other, by a condition (n,)."""
  return jnp.where(condition.reshape(-1, 1, 1, 1), images, others)
