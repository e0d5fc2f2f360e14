"""APGD-CE, against its published algorithm and the code of its authors.

A test says in its docstring which fault makes it fail.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.method.apgd import apgd, apgd_from, random_start, windows
from advprop_jax.method.attack import PIXEL, Attack, generate
from advprop_jax.method.loss import cross_entropy

SIDE, CLASSES = 4, 5
EPSILON = 16.0


@functools.cache
def weights(gain=3.0, seed=3):
  """Of a network of two layers, pixels -> 24 -> CLASSES: float32 numpy (w1, b1, w2)."""
  rng = np.random.default_rng(seed)
  w1 = gain * rng.normal(size=(SIDE * SIDE * 3, 24)) / np.sqrt(SIDE * SIDE * 3)
  return tuple(np.float32(w) for w in (w1, rng.normal(size=24), rng.normal(size=(24, CLASSES))))


def network(images, gain=3.0):
  """Logits, (n, CLASSES); the larger the gain, the more its loss is curved."""
  w1, b1, w2 = weights(gain)
  return jnp.tanh(images.reshape(len(images), -1) @ w1 + b1) @ w2


def case(n=48, gain=3.0, right=True, seed=0):
  """Images, (n, 4, 4, 3) in [-1, 1], keys, and the network's answers as labels, or others."""
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.integers(0, 256, (n, SIDE, SIDE, 3)) * PIXEL - 1, jnp.float32)
  labels = jnp.argmax(network(images, gain), axis=-1)
  if not right:
    labels = jnp.where(jnp.arange(n) % 3 == 0, (labels + 1) % CLASSES, labels)
  return images, labels, jax.random.split(jax.random.PRNGKey(seed), n)


@functools.partial(jax.jit, static_argnames=("num_steps", "norm", "gain"))
def attacked(images, labels, keys, epsilon, num_steps=20, norm="linf", gain=3.0):
  logits_of = functools.partial(network, gain=gain)
  return apgd(logits_of, labels, images, keys, epsilon=epsilon, num_steps=num_steps, norm=norm)


def losses_of(images, labels, gain=3.0):
  return np.asarray(cross_entropy(network(images, gain), labels))


def trajectory(start, images, labels, epsilon, num_steps, norm, gain=3.0):
  """The points that the attack visits, (num_steps + 1, n, ...), and its result, both numpy."""
  points = []

  def logits_of(x):
    jax.debug.callback(lambda x: points.append(np.array(x)), x, ordered=True)
    return network(x, gain)

  result = jax.jit(lambda: apgd_from(start, logits_of, labels, images, epsilon, num_steps, norm))()
  jax.effects_barrier()
  return np.stack(points[:num_steps + 1]), np.asarray(result)


# The algorithm once more, for one image, in float64, with loops and ifs.


def plain_loss(x, label, gain):
  """The loss, its gradient, and whether x is misclassified."""
  w1, b1, w2 = (np.float64(w) for w in weights(gain))
  hidden = np.tanh(x.ravel() @ w1 + b1)
  logits = hidden @ w2
  exponentials = np.exp(logits - logits.max())
  probabilities = exponentials / exponentials.sum()
  gradient = w1 @ ((1 - hidden**2) * (w2 @ (probabilities - np.eye(CLASSES)[label])))
  return -np.log(probabilities[label]), gradient.reshape(x.shape), logits.argmax() != label


def plain_projection(x, image, radius, norm):
  change = x - image
  if norm == "linf":
    change = np.clip(change, -radius, radius)
  elif np.linalg.norm(change) > radius:
    change = change * radius / np.linalg.norm(change)
  return np.clip(image + change, -1, 1)


def plain_apgd(start, image, label, epsilon, num_steps, norm, gain):
  """The points it visits, and the result."""
  radius = epsilon * 2 / 255
  size = 2 * radius
  x = before = start
  loss, gradient, wrong = plain_loss(x, label, gain)
  best, best_gradient, best_loss = x, gradient, loss
  fooled_at = x if wrong else None
  window, since = max(int(0.22 * num_steps), 1), 0
  history = [0.0]  # the authors' code compares the first step's loss with an empty entry
  old_best, was_halved = best_loss, True
  points = [x]
  for i in range(num_steps):
    direction = np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)
    new = plain_projection(x + size * direction, image, radius, norm)
    if i > 0:
      new = plain_projection(x + 0.75 * (new - x) + 0.25 * (x - before), image, radius, norm)
    before, x = x, new
    points.append(x)
    loss, gradient, wrong = plain_loss(x, label, gain)
    history.append(loss)
    if wrong:
      fooled_at = x
    if loss > best_loss:
      best, best_gradient, best_loss = x, gradient, loss
    since += 1
    if since == window:
      rises = sum(history[-j] > history[-j - 1] for j in range(1, window + 1))
      halve = rises <= 0.75 * window
      if not was_halved and old_best >= best_loss:
        halve = True
      if halve:
        size /= 2
        x, gradient = best, best_gradient
      was_halved, old_best = halve, best_loss
      window = max(window - max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1))
      since = 0
  if plain_loss(np.float64(image), label, gain)[2]:
    return points, image
  return points, best if fooled_at is None else fooled_at


@contextlib.contextmanager
def all_in_float64():
  """The attack in float64, where hardly a sign or a rise is a matter of rounding."""
  def loss(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]

  with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
    patch.setattr("advprop_jax.method.apgd.cross_entropy", loss)
    yield


@pytest.mark.parametrize(("norm", "epsilon", "gain"), [
    ("linf", 3.0, 3.0), ("linf", EPSILON, 3.0), ("linf", EPSILON, 20.0), ("l2", 40.0, 3.0)])
@pytest.mark.parametrize("num_steps", [0, 1, 7, 20, 100])
def test_points_are_those_of_the_algorithm(norm, epsilon, gain, num_steps):
  """Every point of every image, and every result.

  Fails with another first step, momentum, share of rises (or < for <=), window, start of the second
  condition or of the losses; where the ascent does not go on from the best point, with its
  gradient, or is mixed with another step after that; where the result is another of its points.
  """
  images, labels, keys = case(gain=gain, right=False)
  with all_in_float64():
    images = jnp.asarray(images, jnp.float64)
    start = jnp.asarray(random_start(images, keys, epsilon, norm), jnp.float64)
    points, result = trajectory(start, images, labels, epsilon, num_steps, norm, gain)
  for i in range(len(images)):
    expected, final = plain_apgd(*(np.asarray(x[i]) for x in (start, images)), int(labels[i]),
                                 epsilon, num_steps, norm, gain)
    np.testing.assert_allclose(points[:, i], expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(result[i], final, rtol=0, atol=1e-7)


def test_windows_are_those_of_the_authors():
  """Fails with windows that are rounded after they are summed up, as the paper writes them."""
  steps = np.flatnonzero(windows(100))
  np.testing.assert_array_equal(steps, [22, 41, 57, 70, 80, 87, 93, 99])
  np.testing.assert_array_equal(np.diff(steps, prepend=0), windows(100)[steps])
  np.testing.assert_array_equal(windows(20)[:12], [0, 0, 0, 0, 4, 0, 0, 3, 0, 2, 1, 1])
  for num_steps in range(1, 1000):  # theirs are computed in floats
    lengths = windows(num_steps)
    first = np.flatnonzero(lengths)[0]
    assert lengths[first] == first == max(int(0.22 * num_steps), 1)
    assert lengths.max() == first
    assert min(lengths[lengths > 0]) >= max(int(0.06 * num_steps), 1)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0, 7.7, 16.0, 300.0])
def test_ball_and_range_hold_exactly(epsilon, traced):
  """Fails where a result is not clipped to the ball or the range, or only nearly."""
  images, labels, keys = case(256)
  if traced:
    adversarial = attacked(images, labels, keys, epsilon, num_steps=9)
    radius = np.float32(PIXEL) * np.float32(epsilon)
  else:
    adversarial = apgd(network, labels, images, keys, epsilon=epsilon, num_steps=9)
    radius = np.float32(PIXEL * epsilon)
  change = np.abs(np.float64(adversarial) - np.float64(images))
  assert np.max(np.abs(np.asarray(adversarial - images))) <= radius
  assert change.max() <= radius * (1 + 1e-6)
  assert np.abs(adversarial).max() <= 1
  if epsilon == 0:
    np.testing.assert_array_equal(adversarial, images)
  elif epsilon < 20:
    assert change.max() > radius * (1 - 1e-6)  # the walls are reached


def test_l2_ball_and_range():
  """Fails without a projection after the momentum, or after the start."""
  images, labels, keys = case(256)
  adversarial = attacked(images, labels, keys, 60.0, norm="l2")
  lengths = np.linalg.norm(np.reshape(adversarial - images, (256, -1)), axis=1)
  assert lengths.max() <= 60 * PIXEL * (1 + 1e-5)
  assert lengths.max() > 60 * PIXEL * (1 - 1e-4)
  assert np.abs(adversarial).max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_start_is_on_the_border(norm):
  """Fails where the noise is not scaled up to the border, or is of another distribution."""
  keys = jax.random.split(jax.random.PRNGKey(0), 2000)
  noise = random_start(jnp.zeros((2000, SIDE, SIDE, 3)), keys, 4.0, norm)
  noise = np.asarray(noise).reshape(2000, -1) / (4 * PIXEL)
  size = np.abs(noise).max(1) if norm == "linf" else np.linalg.norm(noise, axis=1)
  np.testing.assert_allclose(size, 1, rtol=1e-5)
  assert np.abs(noise.mean(0)).max() < 0.07
  if norm == "linf":  # all but the largest are uniform, nearly
    np.testing.assert_allclose(
        np.quantile(noise, np.linspace(0, 1, 11)), np.linspace(-1, 1, 11), atol=0.03)
  else:
    np.testing.assert_allclose(np.cov(noise.T) * noise.shape[1], np.eye(noise.shape[1]), atol=0.2)


def test_is_stronger_than_steps_of_a_bad_size():
  """Fails where the step size stays as it is, on a loss that is much curved.

  PGD has as many gradients, and steps that do not reach the border, that cross half the ball, or
  all of it, as APGD's first one.
  """
  gain, epsilon, num_steps = 20.0, 8.0, 40
  images, labels, keys = case(256, gain)

  def loss(x):
    return jnp.sum(cross_entropy(network(x, gain), labels))

  def fooled(x):
    return int(jnp.sum(jnp.argmax(network(x, gain), axis=-1) != labels))

  ours = attacked(images, labels, keys, epsilon, num_steps=num_steps, gain=gain)
  for step_size in (epsilon / 100, epsilon, 2 * epsilon):
    attack = Attack(epsilon=epsilon, step_size=step_size, num_steps=num_steps + 1)
    theirs = generate(loss, images, keys, attack)
    print(f"step {step_size:g}: {fooled(theirs)} of 256 fooled, by APGD {fooled(ours)}")
    assert fooled(ours) >= fooled(theirs) + 20
    assert losses_of(ours, labels, gain).mean() > losses_of(theirs, labels, gain).mean() + 1


def test_misclassified_images_stay_as_they_are():
  """Fails where an image counts as robust although it is misclassified before the attack."""
  images, labels, keys = case(right=False)
  adversarial = attacked(images, labels, keys, 8.0)
  wrong = np.argmax(network(images), axis=-1) != labels
  assert wrong.sum() == 16
  np.testing.assert_array_equal(adversarial[wrong], images[wrong])
  assert np.all(np.any(adversarial != images, axis=(1, 2, 3))[~wrong])


def test_key_is_all_that_is_random():
  """Fails with a start that is the same for all images, or for all keys."""
  images, labels, keys = case()
  np.testing.assert_array_equal(*(attacked(images, labels, keys, EPSILON) for _ in range(2)))
  others = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
  starts = [np.asarray(attacked(images[:1].repeat(48, 0), labels[:1].repeat(48), k, EPSILON,
                                num_steps=0)).reshape(48, -1) for k in (keys, others)]
  assert len(np.unique(np.concatenate(starts), axis=0)) == 96


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_other_images_play_no_part(norm):
  """Fails where step size, checkpoint or best point are those of the batch, or rows are mixed."""
  images, labels, keys = case()
  together = attacked(images, labels, keys, EPSILON, norm=norm)
  order = np.random.default_rng(1).permutation(48)
  turned = attacked(images[order], labels[order], keys[order], EPSILON, norm=norm)
  np.testing.assert_array_equal(turned, together[order])
  # Padding, as an evaluation's last batch has it.
  padded = attacked(images.at[24:].set(0), labels.at[24:].set(0), keys, EPSILON, norm=norm)
  np.testing.assert_array_equal(padded[:24], together[:24])


def test_one_program_for_all_strengths_and_no_more_for_more_steps():
  """Fails where epsilon is a constant of the program, or the loop is unrolled."""
  images, labels, keys = case(4)
  traced = []

  def logits_of(x):
    traced.append(x)
    return network(x)

  @functools.partial(jax.jit, static_argnames="num_steps")
  def attack(epsilon, num_steps):
    return apgd(logits_of, labels, images, keys, epsilon=epsilon, num_steps=num_steps)

  results = [attack(epsilon, num_steps=5) for epsilon in (1.0, 2.0, jnp.float32(7.0))]
  assert attack._cache_size() <= 2  # a Python float has a weak type
  reached = [float(jnp.max(jnp.abs(x - images))) / PIXEL for x in results]
  np.testing.assert_allclose(reached, [1, 2, 7], rtol=1e-5)
  traced.clear()
  attack(3.0, num_steps=100)
  assert len(traced) == 2  # once for gradients, and once to look at the images themselves


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_flows_through_the_attack(norm):
  """Fails without stop_gradient: the outer gradient would go through the inner steps."""
  images, labels, keys = case(4)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradients(images, scale):
    return jnp.sum(apgd(lambda x: scale * network(x), labels, images, keys, epsilon=8.0,
                        num_steps=3, norm=norm) ** 2)

  assert not any(np.any(gradient) for gradient in gradients(images, 1.5))
