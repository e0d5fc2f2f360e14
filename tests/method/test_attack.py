"""The attackers, and each way in which public implementations of AdvProp's attack err.

A test that guards against such an error says in its docstring which fault makes it fail.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.method.attack import (
  ATTACKS,
  NORMS,
  PIXEL,
  Attack,
  bounds,
  create_attack,
  generate,
  least_likely_targets,
  ramped,
  random_noise,
  random_targets,
)
from advprop_jax.method.step import attack_images
from tests import one_block

KEY = jax.random.PRNGKey(0)


# Shared by the tests, so that each combination of settings compiles once.
compiled_attack = jax.jit(attack_images, static_argnums=(0, 2, 3))
compiled_apply = jax.jit(lambda model, variables, images, domain="clean": model.apply(
    variables, images, domains=(domain,)), static_argnums=(0, 3))


def image_keys(n, seed=0):
  return jax.random.split(jax.random.PRNGKey(seed), n)


def random_images(n=8, size=28, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3))
  return jnp.asarray(pixels * (2 / 255) - 1, jnp.float32)


@pytest.fixture(scope="module")
def network():
  """A network with variables that differ between its domains, images and labels."""
  model = one_block.create()
  variables = model.init(KEY, jnp.zeros((1, 28, 28, 3)))
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(1)
  leaves = [leaf + jnp.asarray(rng.uniform(0.01, 0.3, leaf.shape), leaf.dtype) for leaf in leaves]
  return model, jax.tree.unflatten(tree, leaves), random_images(), jnp.arange(8) % 10


def attacked(network, domain="adversarial", keys=None, dropout_key=None, **settings):
  model, variables, images, labels = network
  keys = image_keys(len(images)) if keys is None else keys
  attack = Attack(**{"label_smoothing": 0.1, **settings})
  return compiled_attack(model, variables, domain, attack, images, labels, keys, dropout_key)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0, 16.0, 300.0])
def test_ball_and_range_hold_exactly(epsilon):
  """Fails where the result is not clipped to the ball, to the valid range, or only nearly."""
  images = random_images(16)
  noise = jax.random.normal(KEY, images.shape)
  adversarial = generate(lambda x: jnp.sum(noise * x), images, image_keys(16),
                    Attack(epsilon=epsilon, step_size=2.0, num_steps=7))
  assert jnp.max(jnp.abs(adversarial - images)) <= np.float32(PIXEL * epsilon)
  assert jnp.max(jnp.abs(adversarial)) <= 1
  if epsilon == 0:
    np.testing.assert_array_equal(adversarial, images)
  elif epsilon <= 4:  # a ball with room for seven steps of two: the walls are reached
    np.testing.assert_allclose(jnp.max(jnp.abs(adversarial - images)), PIXEL * epsilon, rtol=1e-5)


def test_bounds_are_exact_for_every_image():
  """Fails with bounds that are images +- epsilon as rounded."""
  for epsilon in PIXEL * np.linspace(0.1, 8, 40, dtype=np.float32):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, 20_000), jnp.float32)
    lower, upper = bounds(images, epsilon)
    assert jnp.all(images - lower <= epsilon)
    assert jnp.all(upper - images <= epsilon)
    assert jnp.all((lower >= -1) & (upper <= 1) & (lower <= images) & (images <= upper))


def test_linear_loss_has_the_closed_form():
  """x_n = clip(x_0 + n * step * sign(w)); with steps enough, images + epsilon * sign(w)."""
  images, w = random_images(4), jax.random.normal(KEY, (28, 28, 3))
  attack = Attack(epsilon=3.0, step_size=0.5, num_steps=4)
  keys = image_keys(4)
  start = images + random_noise(images.shape[1:], keys, attack)
  expected = jnp.clip(jnp.clip(start, -1, 1) + 4 * 0.5 * PIXEL * jnp.sign(w),
                      images - 3 * PIXEL, images + 3 * PIXEL).clip(-1, 1)
  adversarial = generate(lambda x: jnp.sum(x * w), images, keys, attack)
  np.testing.assert_allclose(adversarial, expected, atol=1e-6)
  attack = dataclasses.replace(attack, num_steps=12)
  adversarial = generate(lambda x: jnp.sum(x * w), images, keys, attack)
  np.testing.assert_allclose(
      adversarial, jnp.clip(images + 3 * PIXEL * jnp.sign(w), -1, 1), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("settings", "theirs"), [
    ({"name": "pgd"}, "LinfPGD"),
    ({"name": "ifgsm"}, "LinfBasicIterativeAttack"),
    ({"name": "fgsm"}, "LinfFastGradientAttack"),
    ({"name": "pgd", "norm": "l2", "epsilon": 100.0, "step_size": 60.0}, "L2PGD"),
    ({"name": "ifgsm", "norm": "l2", "epsilon": 100.0, "step_size": 60.0},
     "L2BasicIterativeAttack"),
    ({"name": "fgsm", "norm": "l2", "epsilon": 100.0}, "L2FastGradientAttack"),
])
def test_foolbox_gives_the_same_images(network, settings, theirs):
  """Foolbox's attacks on the same JAX network, from the same start."""
  foolbox = pytest.importorskip("foolbox")
  import eagerpy

  model, variables, images, labels = network
  keys = image_keys(len(images))
  attack = create_attack(**{"epsilon": 4.0, "step_size": 1.5, "num_steps": 3, **settings})
  noise = (random_noise(images.shape[1:], keys, attack) if attack.clean_start == 0
           else jnp.zeros_like(images))

  class SameStart(getattr(foolbox.attacks, theirs)):
    def get_random_start(self, x0, epsilon):
      return eagerpy.astensor(x0.raw + noise)

  wrapped = foolbox.JAXModel(
      lambda x: model.apply(variables, x, domains=("adversarial",)), bounds=(-1, 1),
      data_format="channels_last")
  options = {} if theirs.endswith("FastGradientAttack") else {
      "abs_stepsize": PIXEL * attack.step_size, "steps": attack.num_steps}
  expected = SameStart(**options).run(
      wrapped, images, foolbox.criteria.Misclassification(labels), epsilon=PIXEL * attack.epsilon)
  ours = compiled_attack(model, variables, "adversarial", attack, images, labels, keys)
  change = np.asarray(ours - images).reshape(len(images), -1)
  reached = (np.abs(change).max(1) if attack.norm == "linf" else np.linalg.norm(change, axis=1))
  assert np.all(reached > 0.8 * PIXEL * attack.epsilon)
  np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_the_attack_is_through_the_auxiliary_bn_alone(network):
  """Fails where the attacked network uses the main batch norms (statistics, scale or bias)."""
  model, variables, images, labels = network
  reference = attacked(network)

  def move(path, leaf):
    name, collection = path[-1].key, path[0].key
    main = collection == "batch_stats" or (name in ("scale", "bias") and "norm" in path[-2].key)
    return leaf * 1.7 + 0.3 if main else leaf

  moved = jax.tree_util.tree_map_with_path(move, variables)
  other = (model, moved, images, labels)
  assert not np.array_equal(*(compiled_apply(model, v, images) for v in (moved, variables)))
  np.testing.assert_array_equal(reference, attacked(other))
  assert not np.array_equal(attacked(network, "clean"), attacked(other, "clean"))


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_statistics_of_the_attack(network, statistics):
  """Fails where "running" statistics are taken from the batch, or "batch" ones from the state."""
  model, variables, images, labels = network
  moved = {**variables, "batch_stats_adversarial": jax.tree.map(
      lambda x: 2 * x + 0.5, variables["batch_stats_adversarial"])}
  same = np.array_equal(attacked(network, statistics=statistics),
                        attacked((model, moved, images, labels), statistics=statistics))
  assert same == (statistics == "batch")
  alone = [attacked((model, variables, images[i:i + 1], labels[i:i + 1]), statistics=statistics,
                    keys=image_keys(8)[i:i + 1]) for i in range(2)]
  alone = np.concatenate(alone)
  close = np.mean(np.abs(alone - attacked(network, statistics=statistics)[:2]) < 1e-6)
  assert (close > 0.999) == (statistics == "running")  # the other images play no part


def test_random_start_is_uniform_noise():
  """Fails for other distributions, for a part of the starts clean, for one draw for all images."""
  attack = Attack(epsilon=4.0)
  noise = np.asarray(random_noise((28, 28, 3), image_keys(500), attack)) / (4 * PIXEL)
  assert np.all(np.abs(noise) <= 1)
  assert np.mean(noise == 0) < 1e-4
  quantiles = np.quantile(noise, np.linspace(0, 1, 11))
  np.testing.assert_allclose(quantiles, np.linspace(-1, 1, 11), atol=0.01)
  correlation = np.corrcoef(noise.reshape(500, -1))
  assert np.max(np.abs(correlation - np.eye(500))) < 0.15


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_probability_of_a_clean_start(probability):
  """Fails where the share of noise is another (`randn > 0.2`: 42 %), or drawn once per batch."""
  n = 20_000
  noise = np.asarray(random_noise((4, 4, 3), image_keys(n), Attack(clean_start=probability)))
  clean = np.all(noise == 0, axis=(1, 2, 3))
  assert np.all(clean == np.any(noise == 0, axis=(1, 2, 3)))  # whole images
  deviation = np.sqrt(probability * (1 - probability) / n)
  assert abs(clean.mean() - probability) <= 3 * deviation


def test_random_target_is_never_the_label():
  """Fails where the target is drawn from all classes, or not uniformly."""
  labels = jnp.arange(100_000) % 5
  targets = np.asarray(random_targets(labels, image_keys(100_000), 5))
  assert not np.any(targets == labels)
  counts = np.array([[np.sum((labels == a) & (targets == b)) for b in range(5)] for a in range(5)])
  np.testing.assert_allclose(counts[~np.eye(5, dtype=bool)], 5000, atol=300)
  assert counts.trace() == 0


def test_random_target_lowers_the_loss_of_the_target(network):
  """Fails with the untargeted sign: the attacked loss is that of another label, going down."""
  model, variables, images, labels = network
  settings = {"epsilon": 8.0, "step_size": 2.0, "num_steps": 6, "target": "random"}
  adversarial = attacked(network, **settings)
  keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(image_keys(8))
  targets = random_targets(labels, keys, 10)

  def of_targets(images):
    logits = compiled_apply(model, variables, images, "adversarial")
    return -np.mean(np.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1))

  assert of_targets(adversarial) < of_targets(images) - 0.01


def test_step_size_is_what_was_set(network):
  """Fails where it is raised to epsilon / num_steps, or taken in other units."""
  images = network[2]
  adversarial = attacked(network, epsilon=8.0, step_size=1.0, num_steps=1, clean_start=1.0)
  change = np.abs(adversarial - images)[np.abs(images) < 1 - 2 * PIXEL]
  moved = change > 0  # the stem's stride leaves pixels out, which have no gradient
  assert moved.mean() > 0.4
  np.testing.assert_allclose(change[moved], PIXEL, rtol=1e-3)


def test_no_dropout_in_the_attack_by_default(network):
  """Fails where dropout or stochastic depth of the attacked network depend on training mode."""
  reference = attacked(network)
  np.testing.assert_array_equal(reference, attacked(network, dropout_key=jax.random.PRNGKey(1)))
  dropped = attacked(network, dropout_key=jax.random.PRNGKey(1), dropout=True)
  assert not np.array_equal(reference, dropped)


def test_the_attack_raises_the_loss(network):
  model, variables, _, labels = network

  def loss(images):
    logits = compiled_apply(model, variables, images, "adversarial")
    return -np.mean(np.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

  losses = [loss(attacked(network, epsilon=8.0, step_size=2.0, num_steps=n)) for n in (0, 1, 6)]
  assert losses[0] < losses[1] < losses[2]


def test_no_gradient_flows_through_the_attack(network):
  """Fails without stop_gradient: the outer gradient would go through the inner steps."""
  images = network[2]
  gradient = jax.grad(lambda x: jnp.sum(generate(
      lambda y: jnp.sum(jnp.sin(y)), x, image_keys(8), Attack(num_steps=2))))(images)
  assert not np.any(gradient)


def test_the_program_does_not_grow_with_num_steps(network):
  """Fails with an unrolled loop."""
  model, variables, images, labels = network

  def size(num_steps):
    lowered = jax.jit(lambda v: attack_images(
        model, v, "adversarial", Attack(num_steps=num_steps), images, labels,
        image_keys(8))).lower(variables)
    return len(lowered.as_text())

  assert abs(size(10) - size(1)) < 100


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attacker_keeps_the_contract(name, norm):
  """What is registered is in the ball and the range, and pure, whatever it is."""
  images, keys = random_images(4), image_keys(4)
  attack = create_attack(name=name, norm=norm, epsilon=20.0, step_size=9.0)

  def run():
    return generate(lambda x: jnp.sum(jnp.sin(9 * x)), images, keys, attack)

  first = run()
  change = np.asarray(first - images).reshape(4, -1)
  assert first.shape == images.shape
  assert jnp.max(jnp.abs(first)) <= 1
  assert np.all(np.abs(change).max(1) > 0)
  if attack.ball and norm == "linf":
    assert np.abs(change).max() <= np.float32(20 * PIXEL)
  elif attack.ball:
    assert np.linalg.norm(change, axis=1).max() <= 20 * PIXEL * (1 + 1e-5)
  np.testing.assert_array_equal(first, run())


def test_gd_has_no_ball_and_no_start():
  """Fails where it is projected to the ball, or starts from noise: n steps, cut off at [-1, 1]."""
  images, w = random_images(4), jax.random.normal(KEY, (28, 28, 3))
  attack = create_attack(name="gd", epsilon=1.0, step_size=3.0, num_steps=5)
  adversarial = generate(lambda x: jnp.sum(x * w), images, image_keys(4), attack)
  np.testing.assert_allclose(
      adversarial, jnp.clip(images + 15 * PIXEL * jnp.sign(w), -1, 1), atol=1e-6)


def test_fgsm_is_one_step_of_epsilon_whatever_is_set():
  images, w = random_images(4), jax.random.normal(KEY, (28, 28, 3))
  attack = create_attack(name="fgsm", epsilon=3.0, step_size=1.0, num_steps=9, clean_start=0.0)
  adversarial = generate(lambda x: jnp.sum(x * w), images, image_keys(4), attack)
  np.testing.assert_allclose(
      adversarial, jnp.clip(images + 3 * PIXEL * jnp.sign(w), -1, 1), atol=1e-6)


def test_l2_steps_of_a_linear_loss_have_the_closed_form():
  """x_n = x_0 + n * step * w / |w| from the image, until the ball ends it."""
  images, w = 0.3 * random_images(4), jax.random.normal(KEY, (28, 28, 3))
  unit = w / jnp.sqrt(jnp.sum(w ** 2))
  for num_steps, length in ((2, 50.0), (6, 120.0)):
    attack = create_attack(name="ifgsm", norm="l2", epsilon=120.0, step_size=25.0,
                           num_steps=num_steps)
    adversarial = generate(lambda x: jnp.sum(x * w), images, image_keys(4), attack)
    np.testing.assert_allclose(adversarial, images + length * PIXEL * unit, atol=1e-6)


def test_l2_start_is_uniform_in_the_ball():
  """Fails for noise on the sphere, or uniform in the radius: radius ** dimension is uniform."""
  noise = np.asarray(random_noise((2, 2, 1), image_keys(4000), Attack(norm="l2", epsilon=8.0)))
  radius = np.linalg.norm(noise.reshape(4000, -1), axis=1) / (8 * PIXEL)
  np.testing.assert_allclose(np.quantile(radius ** 4, np.linspace(0, 1, 11)),
                             np.linspace(0, 1, 11), atol=0.03)
  np.testing.assert_allclose(noise.mean(0) / PIXEL, 0, atol=0.3)


def test_least_likely_target_is_never_the_label(network):
  logits = jnp.asarray([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
  np.testing.assert_array_equal(least_likely_targets(logits, jnp.array([0, 0])), [2, 2])
  model, variables, images, labels = network
  adversarial = attacked(network, epsilon=8.0, step_size=2.0, num_steps=6, target="least_likely")
  before, after = (compiled_apply(model, variables, x, "adversarial")
                   for x in (images, adversarial))
  targets = least_likely_targets(before, labels)[:, None]
  raised = [np.mean(np.take_along_axis(jax.nn.log_softmax(x), targets, 1)) for x in (before, after)]
  assert raised[1] > raised[0] + 0.01


def test_epsilon_grows_with_the_steps():
  """In proportion, from the first update on, then it stays; without a ramp it is as set."""
  attack = Attack(epsilon=4.0, ramp_steps=8)
  grown = [float(ramped(attack, jnp.int32(step)).epsilon) for step in (0, 3, 7, 20)]
  np.testing.assert_allclose(grown, [0.5, 2.0, 4.0, 4.0])
  assert ramped(Attack(epsilon=4.0), jnp.int32(0)).epsilon == 4.0
  images, w = random_images(2), jax.random.normal(KEY, (28, 28, 3))
  adversarial = jax.jit(lambda step: generate(
      lambda x: jnp.sum(x * w), images, image_keys(2), ramped(attack, step)))(jnp.int32(1))
  np.testing.assert_allclose(jnp.max(jnp.abs(adversarial - images)), PIXEL, rtol=1e-5)


def test_hard_and_smoothed_labels_are_attacked_differently(network):
  hard, smooth = (attacked(network, label_smoothing=value, epsilon=8.0) for value in (0.0, 0.9))
  assert not np.array_equal(hard, smooth)
