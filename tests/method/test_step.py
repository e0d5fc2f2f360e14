"""The train step: one update from the sum of the losses, each through its own batch norms."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advprop_jax.method.attack import Attack
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.schemes import SCHEMES
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import (
  Method,
  after,
  attack_images,
  forward,
  norm,
  passes,
  to_model_units,
  train_step,
)
from advprop_jax.models.batch_norm import drop_auxiliary
from advprop_jax.models.dropout import image_keys
from tests import one_block

RATE = 0.5  # the optimizer is plain SGD, so that parameters show the gradient: (old - new) / RATE


def make_method(scheme="advprop", **settings):
  scheme = SCHEMES[scheme]
  model = one_block.create(domains=scheme.domains, dropout_rate=0.0, drop_path_rate=0.0)
  attack = Attack(num_steps=2, label_smoothing=0.1)
  return Method(**{"model": model, "scheme": scheme, "attack": attack,
                   "optimizer": optax.sgd(RATE), **settings})


def make_state(method, seed=0, ema=True):
  state = create_train_state(method.model, method.optimizer, seed, 28, ema)
  rng = np.random.default_rng(7)  # away from the symmetric start: batch norms of their own
  return state.replace(params=jax.tree.map(
      lambda x: x + rng.uniform(-0.1, 0.1, x.shape).astype(np.float32), state.params))


def make_batch(n=8, seed=0):
  rng = np.random.default_rng(seed)
  return {"image": rng.integers(0, 256, (n, 28, 28, 3), np.uint8),
          "label": (np.arange(n) % 10).astype(np.int32)}


@functools.cache
def compiled(method):
  return jax.jit(functools.partial(train_step, method))


def gradients(method, state, batch):
  new_state, metrics = compiled(method)(state, batch)
  return jax.tree.map(lambda a, b: (a - b) / RATE, state.params, new_state.params), metrics


def assert_close(a, b, rtol=2e-4, atol=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.fixture(scope="module")
def advprop():
  method = make_method()
  return method, make_state(method), make_batch()


def by_hand(method, state, batch):
  """Two losses, two passes, written out: what the step must do."""
  attack_key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
  images, labels = to_model_units(batch["image"]), batch["label"]
  keys = image_keys(attack_key, len(labels), None)
  adversarial = attack_images(method.model, state.variables, "adversarial", method.attack, images,
                              labels, keys)

  def loss(params, images, domain, collection):
    logits, updates = method.model.apply(
        {**state.variables, "params": params}, images, domains=(domain,), train=True,
        mutable=[collection])
    return jnp.mean(cross_entropy(logits, labels, method.label_smoothing)), updates

  def both(params):
    clean, stats = loss(params, images, "clean", "batch_stats")
    other, other_stats = loss(params, adversarial, "adversarial", "batch_stats_adversarial")
    return clean + other, ({**stats, **other_stats}, {"clean": clean, "adversarial": other})

  gradient, (stats, losses) = jax.jit(jax.grad(both, has_aux=True))(state.params)
  return gradient, stats, losses


def test_the_step_is_algorithm_1(advprop):
  """One gradient of L(clean) + L(adversarial), and both statistics moved once.

  Fails with the mean over both batches (half the sum), with two updates, with statistics moved by
  the attack, or with clean images through the auxiliary batch norms.
  """
  method, state, batch = advprop
  gradient, stats, losses = by_hand(method, state, batch)
  ours, metrics = gradients(method, state, batch)
  assert_close(ours, gradient)
  new_state, _ = compiled(method)(state, batch)
  assert_close(new_state.batch_stats, stats)
  np.testing.assert_allclose(metrics["loss"], losses["clean"] + losses["adversarial"], rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/adversarial"], losses["adversarial"], rtol=1e-5)
  assert int(new_state.step) == 1
  np.testing.assert_array_equal(new_state.key, state.key)


@pytest.mark.parametrize("shared", [False, True])
def test_passes_are_one_pass_of_both_domains(shared):
  """A pass for each domain is one pass of both; with shared statistics it is one, of one batch."""
  method = make_method()
  model = dataclasses.replace(method.model, share_statistics=shared)
  method = dataclasses.replace(method, model=model)
  state, images = make_state(method), to_model_units(make_batch(8)["image"])
  parts = {"clean": {"image": images[:4]}, "adversarial": {"image": images[4:]}}
  logits, moved = {}, state.batch_stats
  for names in passes(method.scheme, model):
    own, moved = forward(method, state.params, moved, {name: parts[name] for name in names},
                         jax.random.PRNGKey(0))
    logits |= own
  expected, expected_moved = model.apply(
      state.variables, images, domains=("clean", "adversarial"), train=True,
      mutable=list(state.batch_stats))
  assert len(passes(method.scheme, model)) == (1 if shared else 2)
  assert_close(jnp.concatenate([logits["clean"], logits["adversarial"]]), expected)
  assert_close(moved, expected_moved)


def test_what_comes_after_waits_for_all_results_and_is_the_same():
  """Fault: a result that the images do not hang on, which may then be computed beside them."""
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
  results = [{"a": np.full((3, 2), -1.0, np.float32), "b": np.full((5,), np.nan, np.float32)},
             [np.float32(np.inf) * np.ones((1, 2, 3), np.float32)]]
  wait = jax.jit(lambda results, image: after(results, {"image": image, "label": 3})["image"])
  np.testing.assert_array_equal(wait(results, image), image)
  signature = next(line for line in wait.lower(results, image).as_text().splitlines()
                   if "@main" in line)
  assert signature.count("%arg") == 4      # what nothing hangs on is left out


@pytest.mark.parametrize("shapes", [[(3, 5), (64, 65), (7,), (4096,), (4097,)], [(5,)], [(70, 70)]])
def test_norm_of_small_and_large_arrays(shapes):
  """Fault: an array left out or counted twice, or one number that is not finite left out."""
  rng = np.random.default_rng(0)
  tree = {str(i): rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
  numbers = np.concatenate([x.reshape(-1) for x in tree.values()])
  np.testing.assert_allclose(jax.jit(norm)(tree), np.linalg.norm(numbers.astype(np.float64)), 1e-6)
  for name, bad in itertools.product(tree, (np.nan, np.inf)):
    spoiled = tree | {name: tree[name].copy()}
    spoiled[name].flat[-1] = bad
    np.testing.assert_equal(float(jax.jit(norm)(spoiled)), bad)


def test_weights_of_the_losses(advprop):
  """Fails where a weight is ignored: the gradient is linear in the weights."""
  method, state, batch = advprop

  def gradient(clean, adversarial):
    weights = {"clean": clean, "adversarial": adversarial}
    return gradients(dataclasses.replace(method, scheme=method.scheme.adjusted(weights)),
                     state, batch)[0]

  combined = jax.tree.map(lambda a, b: 0.5 * a + 2 * b, gradient(1.0, 0.0), gradient(0.0, 1.0))
  assert_close(combined, gradient(0.5, 2.0), atol=1e-4)


def test_the_attack_moves_no_statistics(advprop):
  """Fails where the attack moves running statistics: more steps of it would move them further.

  With a ball of radius zero the adversarial images are the clean ones however long the attack is.
  """
  method, state, batch = advprop
  runs = [compiled(dataclasses.replace(method, attack=Attack(
      epsilon=0.0, num_steps=n, statistics=statistics)))(state, batch)[0]
      for n, statistics in ((1, "running"), (4, "running"), (4, "batch"))]
  for other in runs[1:]:
    assert_close(runs[0].batch_stats, other.batch_stats, rtol=1e-5, atol=1e-7)


def test_vanilla_is_advprop_without_adversarial_images():
  """The clean part of AdvProp's gradient is vanilla's, and the shared start is the same."""
  vanilla, advprop = make_method("vanilla"), make_method("advprop")
  advprop = dataclasses.replace(advprop, scheme=advprop.scheme.adjusted({"adversarial": 0.0}))
  a, b = (create_train_state(m.model, m.optimizer, 3, 28, False) for m in (vanilla, advprop))
  jax.tree.map(np.testing.assert_array_equal, a.variables, drop_auxiliary(b.variables))
  a, _ = compiled(vanilla)(a, make_batch())
  b, _ = compiled(advprop)(b, make_batch())
  assert_close(a.variables, drop_auxiliary(b.variables))


def test_accumulation_is_the_mean_over_micro_batches(advprop):
  """Statistics move once per micro-batch; each micro-batch is normalised by itself."""
  method, state, _ = advprop
  method = dataclasses.replace(method, attack=Attack(epsilon=0.0, num_steps=0))
  batch = make_batch(8)
  halves = [{k: v[i:i + 4] for k, v in batch.items()} for i in (0, 4)]
  first, _ = gradients(method, state, halves[0])
  second, _ = gradients(method, state, halves[1])
  accumulated, _ = gradients(dataclasses.replace(method, accumulation=2), state, batch)
  assert_close(accumulated, jax.tree.map(lambda a, b: (a + b) / 2, first, second), atol=1e-4)
  moved, _ = compiled(method)(state, halves[0])
  moved, _ = compiled(method)(state.replace(batch_stats=moved.batch_stats), halves[1])
  both, _ = compiled(dataclasses.replace(method, accumulation=2))(state, batch)
  assert_close(both.batch_stats, moved.batch_stats)


def test_moving_averages_are_of_params_and_statistics(advprop):
  method, state, batch = advprop
  new_state, _ = compiled(method)(state, batch)
  decay = min(method.ema_decay, 2 / 11)  # the first update
  expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema,
                          new_state.variables)
  assert_close(new_state.ema, expected)
  assert set(new_state.ema) == {"params", "batch_stats", "batch_stats_adversarial"}
  jax.tree.map(np.testing.assert_array_equal, new_state.evaluation_variables, new_state.ema)


def test_dropping_the_auxiliary_bns_changes_no_bit(advprop):
  """Fails where the deployed network depends on auxiliary batch norms."""
  method, state, batch = advprop
  state, _ = compiled(method)(state, batch)
  images = to_model_units(batch["image"])
  deployed = dataclasses.replace(method.model, domains=("clean",))
  dropped = drop_auxiliary(state.variables)
  assert set(dropped) == {"params", "batch_stats"}
  assert jax.tree.structure(dropped) == jax.tree.structure(
      jax.eval_shape(deployed.init, jax.random.PRNGKey(0), images))
  np.testing.assert_array_equal(jax.jit(deployed.apply)(dropped, images),
                                jax.jit(method.model.apply)(state.variables, images))


def test_a_step_has_new_noise_and_the_same_step_the_same(advprop):
  method, state, batch = advprop
  again, _ = compiled(method)(state, batch)
  first, _ = compiled(method)(state, batch)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  later, _ = compiled(method)(state.replace(step=jnp.int32(1)), batch)
  assert not np.array_equal(first.batch_stats["batch_stats_adversarial"]["stem_norm"]["mean"],
                            later.batch_stats["batch_stats_adversarial"]["stem_norm"]["mean"])


def test_training_lowers_both_losses():
  method = make_method(optimizer=optax.sgd(0.5, momentum=0.9), label_smoothing=0.0)
  state, batch, losses = make_state(method, ema=False), make_batch(), []
  for _ in range(60):
    state, metrics = compiled(method)(state, batch)
    losses.append((float(metrics["loss/clean"]), float(metrics["loss/adversarial"])))
  assert np.all(np.array(losses[-1]) < 0.8 * np.array(losses[0])), losses[-1]


def test_model_units():
  np.testing.assert_allclose(to_model_units(np.array([0, 255, 51], np.uint8)), [-1, 1, -0.6],
                             atol=1e-6)
