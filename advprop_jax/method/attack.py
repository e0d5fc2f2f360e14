"""Attackers: (loss of images, images, a key for each image) -> adversarial images.

Images are in model units, [-1, 1]. An attack's epsilon and step size are in 0-255 units, as the
paper gives them, and PIXEL converts them, here and nowhere else. An attack is a pure function of
its arguments: whichever network, batch norms and labels it is to work against are inside `loss`,
and it sees nothing of them but the gradient with respect to the images.

An attacker is a start, some steps of gradient ascent, and a projection after each of them. All
attackers of the paper are settings of this one: ATTACKS.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PIXEL = 2 / 255  # one step of a pixel, 0-255, in model units

Loss = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Attack:
  """The settings of an attacker.

  Attributes:
    name: for messages; `create_attack` makes the settings that belong to a name.
    norm: of the ball, and of a step: "linf", or "l2" over all values of an image.
    epsilon: radius of the ball round each image, 0-255 units, >= 0.
    step_size: of one step, 0-255 units, >= 0; used as it is set.
    num_steps: >= 0; with 0 the start is the result.
    clean_start: probability, per image, that the attack starts at the image itself.
    ball: whether a step ends inside the ball; [-1, 1] holds in any case.
    statistics: batch norm in the attacked network: "running" statistics, or those of the "batch".
      Neither is updated.
    target: "none" raises the loss of the true label; "random" lowers that of another label, drawn
      per image; "least_likely" that of the other label which the network finds least likely.
    dropout: whether the attacked network has dropout and stochastic depth, with the masks of the
      training pass in each of its steps.
    label_smoothing: of the attacked loss.
    ramp_steps: updates over which epsilon grows from 0, in proportion; 0: at once.
  """

  name: str = "pgd"
  norm: str = "linf"
  epsilon: float = 4.0
  step_size: float = 1.0
  num_steps: int = 5
  clean_start: float = 0.0
  ball: bool = True
  statistics: str = "running"
  target: str = "none"
  dropout: bool = False
  label_smoothing: float = 0.0
  ramp_steps: int = 0

  def __str__(self) -> str:
    """What it is in a few words, such as "PGD-5, epsilon 4, step 1"."""
    norm = "L2 " if self.norm == "l2" else ""
    ball = f"epsilon {self.epsilon:g}" if self.ball else "no ball"
    step = "" if self.name == APGD else f", step {self.step_size:g}"
    return f"{norm}{self.name.upper()}-{self.num_steps}, {ball}{step}"


# name -> what it fixes, given the other settings.
ATTACKS: dict[str, Callable[[Attack], Mapping[str, Any]]] = {
    # Projected gradient descent from a random start (Madry et al., ICLR 2018).
    "pgd": lambda attack: {},
    # The same without a random start (Kurakin et al., ICLR 2017).
    "ifgsm": lambda attack: {"clean_start": 1.0},
    # Without start and without ball: gradient ascent in [-1, 1].
    "gd": lambda attack: {"clean_start": 1.0, "ball": False},
    # One step to the border of the ball (Goodfellow et al., ICLR 2015).
    "fgsm": lambda attack: {"clean_start": 1.0, "num_steps": 1, "step_size": attack.epsilon},
}
APGD = "apgd"                          # apgd.py: it sets its own step sizes, and is to evaluate
NORMS = ("linf", "l2")
TARGETS = ("none", "random", "least_likely")
STATISTICS = ("running", "batch")


def create_attack(**settings) -> Attack:
  """An attack with the settings that its name fixes; those win over the ones given."""
  attack = Attack(**settings)
  return dataclasses.replace(attack, **ATTACKS[attack.name](attack))


def generate(loss: Loss, images: jax.Array, keys: jax.Array, attack: Attack) -> jax.Array:
  """Adversarial images: gradient ascent from a start, projected after each step.

  x_0 = project(images + noise),  x_{t+1} = project(x_t + step_size * direction(d loss / d x_t))

  Args:
    loss: images -> the sum of the losses to be raised, one for each image.
    images: (n, h, w, 3), in [-1, 1].
    keys: (n, ...), a random key for each image.
    attack: the settings.

  Returns:
    Adversarial images, (n, h, w, 3), in [-1, 1] exactly, and in the ball: exactly for "linf", to
    float32 for "l2". No gradient flows back through them.
  """
  images = jax.lax.stop_gradient(images)

  def step(_, x):
    return ascend(x, jax.grad(loss)(x), images, attack)

  x = jax.lax.fori_loop(0, attack.num_steps, step, start(images, keys, attack))
  return jax.lax.stop_gradient(x)


def start(images: jax.Array, keys: jax.Array, attack: Attack) -> jax.Array:
  """Where an attack begins: the images with uniform noise of the ball, or as they are."""
  if attack.clean_start == 1:
    return images
  noise = random_noise(images.shape[1:], keys, attack)
  return project(images + noise, images, attack)


def ascend(x: jax.Array, gradient: jax.Array, images: jax.Array, attack: Attack) -> jax.Array:
  """One step from x up the gradient of the loss, projected."""
  if attack.norm == "linf":
    direction = jnp.sign(gradient)
  else:
    direction = gradient / jnp.maximum(_lengths(gradient), 1e-12)
  return project(x + PIXEL * attack.step_size * direction, images, attack)


def project(x: jax.Array, images: jax.Array, attack: Attack) -> jax.Array:
  """The nearest point to x in the ball round images, cut off at [-1, 1]."""
  if not attack.ball:
    return jnp.clip(x, -1, 1)
  epsilon = PIXEL * attack.epsilon
  if attack.norm == "linf":
    return jnp.clip(x, *bounds(images, epsilon))
  change = x - images
  change *= jnp.minimum(1, epsilon / jnp.maximum(_lengths(change), 1e-12))
  return jnp.clip(images + change, -1, 1)  # comes no farther from images, which are in [-1, 1]


def bounds(images: jax.Array, epsilon: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
  """The least and greatest values of each pixel, in the L-infinity ball and in [-1, 1].

  For every x between them |x - images| <= epsilon holds exactly: where the rounding of
  images + epsilon goes beyond the ball, the next float inside is taken.
  """
  lower, upper = images - epsilon, images + epsilon
  lower = jnp.where(images - lower > epsilon, jnp.nextafter(lower, images), lower)
  upper = jnp.where(upper - images > epsilon, jnp.nextafter(upper, images), upper)
  return jnp.maximum(lower, -1), jnp.minimum(upper, 1)


def random_noise(shape: tuple[int, ...], keys: jax.Array, attack: Attack) -> jax.Array:
  """Uniform in the ball, (n, *shape), all zero for an image with probability clean_start."""
  epsilon, values = PIXEL * attack.epsilon, math.prod(shape)

  def draw(key):
    if attack.norm == "linf":          # in a row: along 3 colours the CPU takes 4 times as long
      noise = epsilon * jax.random.uniform(key, (values,), jnp.float32, -1, 1).reshape(shape)
    else:
      noise = epsilon * jax.random.ball(key, values).reshape(shape)
    if attack.clean_start == 0:
      return noise
    is_clean = jax.random.bernoulli(jax.random.fold_in(key, 2), attack.clean_start)
    return jnp.where(is_clean, 0, noise)

  return jax.vmap(draw)(keys)


def ramped(attack: Attack, step: jax.Array) -> Attack:
  """The attack as it is at an update: its epsilon, of type float32, grown so far."""
  if not attack.ramp_steps:
    return attack
  grown = jnp.minimum(1, (step + 1) / attack.ramp_steps)
  return dataclasses.replace(attack, epsilon=attack.epsilon * grown)


def random_targets(labels: jax.Array, keys: jax.Array, num_classes: int) -> jax.Array:
  """A label for each image, (n,), uniform among those that are not its own."""
  offset = jax.vmap(lambda key: jax.random.randint(key, (), 1, num_classes))(keys)
  return (labels + offset) % num_classes


def least_likely_targets(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The label with the lowest logit for each image, (n,), that is not its own.

  *Source:* Kurakin et al., "Adversarial Machine Learning at Scale", ICLR 2017, who let the own
  label be it.
  """
  own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  return jnp.argmin(jnp.where(own, jnp.inf, logits), axis=-1)


def _lengths(x: jax.Array) -> jax.Array:
  """The L2 norm over all values of each image, (n, 1, 1, 1)."""
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))
