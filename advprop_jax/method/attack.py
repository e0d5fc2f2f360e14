"""Attackers: (loss of images, images, a key for each image) -> adversarial images.

Images are in model units, [-1, 1]. An attack's epsilon and step size are in 0-255 units, as the
paper gives them, and PIXEL converts them, here and nowhere else. An attack is a pure function of
its arguments: whichever network, batch norms and labels it is to work against are inside `loss`,
and it sees nothing of them but the gradient with respect to the images.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

PIXEL = 2 / 255  # one step of a pixel, 0-255, in model units

Loss = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Attack:
  """The settings of an attacker.

  Attributes:
    name: a key of ATTACKS.
    epsilon: radius of the L-infinity ball round each image, 0-255 units, >= 0.
    step_size: of one step, 0-255 units, >= 0; used as it is set.
    num_steps: >= 0; with 0 the random start is the result.
    clean_start: probability, per image, that the attack starts at the image itself.
    statistics: batch norm in the attacked network: "running" statistics, or those of the "batch".
      Neither is updated.
    target: "none" raises the loss of the true label; "random" lowers that of another label, drawn
      per image.
    dropout: whether the attacked network has dropout and stochastic depth.
  """

  name: str = "pgd"
  epsilon: float = 4.0
  step_size: float = 1.0
  num_steps: int = 5
  clean_start: float = 0.0
  statistics: str = "running"
  target: str = "none"
  dropout: bool = False


def pgd(loss: Loss, images: jax.Array, keys: jax.Array, attack: Attack) -> jax.Array:
  """Projected gradient descent in the L-infinity ball, from a random start (Madry et al., 2018).

  x_0 = images + noise,  x_{t+1} = clip(x_t + step_size * sign(d loss / d x_t), ball and [-1, 1])

  Args:
    loss: images -> the sum of the losses to be raised, one for each image.
    images: (n, h, w, 3), in [-1, 1].
    keys: (n, ...), a random key for each image.
    attack: the settings.

  Returns:
    Adversarial images, (n, h, w, 3), in [-1, 1] and in the ball, both exactly. No gradient flows
    back through them.
  """
  images = jax.lax.stop_gradient(images)
  lower, upper = bounds(images, PIXEL * attack.epsilon)
  noise = random_start(images.shape[1:], keys, PIXEL * attack.epsilon, attack.clean_start)

  def step(_, x):
    return jnp.clip(x + PIXEL * attack.step_size * jnp.sign(jax.grad(loss)(x)), lower, upper)

  x = jnp.clip(images + noise, lower, upper)
  return jax.lax.stop_gradient(jax.lax.fori_loop(0, attack.num_steps, step, x))


def bounds(images: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
  """The least and greatest values of each pixel, in the ball and in [-1, 1].

  For every x between them |x - images| <= epsilon holds exactly: where the rounding of
  images + epsilon goes beyond the ball, the next float inside is taken.
  """
  lower, upper = images - epsilon, images + epsilon
  lower = jnp.where(images - lower > epsilon, jnp.nextafter(lower, images), lower)
  upper = jnp.where(upper - images > epsilon, jnp.nextafter(upper, images), upper)
  return jnp.maximum(lower, -1), jnp.minimum(upper, 1)


def random_start(shape: tuple[int, ...], keys: jax.Array, epsilon: float,
                 clean_start: float = 0.0) -> jax.Array:
  """Uniform noise in the ball, (n, *shape), all zero for an image with probability clean_start."""
  def draw(key):
    noise = jax.random.uniform(key, shape, jnp.float32, -epsilon, epsilon)
    if clean_start == 0:
      return noise
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 2), clean_start), 0, noise)

  return jax.vmap(draw)(keys)


def random_targets(labels: jax.Array, keys: jax.Array, num_classes: int) -> jax.Array:
  """A label for each image, (n,), uniform among those that are not its own."""
  offset = jax.vmap(lambda key: jax.random.randint(key, (), 1, num_classes))(keys)
  return (labels + offset) % num_classes


ATTACKS = {"pgd": pgd}
TARGETS = ("none", "random")
STATISTICS = ("running", "batch")
