"""The schemes: what each one trains, on what, and through which batch norms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from advprop_jax import train
from advprop_jax.errors import InputError
from advprop_jax.method import attack as attacks
from advprop_jax.method.attack import Attack
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.schemes import SCHEMES, SECOND_VIEW, Part, Scheme
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import (
  Method,
  attack_images,
  forward,
  passes,
  to_model_units,
  train_step,
)
from advprop_jax.models.batch_norm import domains_of_params
from advprop_jax.models.dropout import image_keys
from advprop_jax.runtime.config import default_config
from tests import class_folders, one_block

RATE = 0.5  # the optimizer is plain SGD, so that parameters show the gradient: (old - new) / RATE

# scheme -> domains, losses (weight, images' share), attacked domains.
TABLE = {
    "vanilla": (["clean"], {"clean": (1, 1)}, set()),
    "adversarial": (["clean"], {"adversarial": (1, 1)}, {"clean"}),
    "joint": (["clean"], {"clean": (1, 1), "adversarial": (1, 1)}, {"clean"}),
    "advprop": (["clean", "adversarial"], {"clean": (1, 1), "adversarial": (1, 1)},
                {"adversarial"}),
    "fine_grained": (["clean", "autoaugment", "adversarial"],
                     {"clean": (1, 1), "autoaugment": (1, 1), "adversarial": (1, 1)},
                     {"adversarial"}),
    "fast_advprop": (["clean", "adversarial"], {"clean": (1, 0.8), "adversarial": (0.5, 0.2)},
                     {"adversarial"}),
}


def make_method(scheme, **settings):
  model = one_block.create(domains=scheme.domains, dropout_rate=0.0, drop_path_rate=0.0)
  attack = Attack(num_steps=1, epsilon=8.0, step_size=8.0, label_smoothing=0.1)
  return Method(**{"model": model, "scheme": scheme, "attack": attack,
                   "optimizer": optax.sgd(RATE), **settings})


def make_batch(n=20):
  rng = np.random.default_rng(0)
  image, second = rng.integers(0, 256, (2, n, 28, 28, 3), np.uint8)
  return {"image": image, SECOND_VIEW: second, "label": (np.arange(n) % 10).astype(np.int32)}


def make_state(method):
  """A state away from the symmetric start."""
  state = create_train_state(method.model, method.optimizer, 0, 28, False)
  rng = np.random.default_rng(7)
  return state.replace(params=jax.tree.map(
      lambda x: x + rng.uniform(-0.1, 0.1, x.shape).astype(np.float32), state.params))


@functools.cache
def one_step(name):
  """(method, state, the state and the metrics after one step) of a scheme as it stands."""
  method = make_method(SCHEMES[name])
  state = make_state(method)
  return method, state, *jax.jit(functools.partial(train_step, method))(state, make_batch())


def moved_params(state, new_state):
  """{path: whether a step moved it}, without biases that the next batch norm takes out again."""
  moved = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), state.params, new_state.params)
  return {path: value for path, value in traverse_util.flatten_dict(moved).items()
          if path[-2] != "project_norm" or not path[-1].startswith("bias")}


def assert_close(a, b, rtol=1e-3, atol=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_every_scheme_has_a_row():
  assert set(SCHEMES) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_domains_parts_and_attacks(name):
  domains, losses, attacked = TABLE[name]
  scheme = SCHEMES[name]
  assert list(scheme.domains) == domains
  assert {part.name: (part.weight, scheme.share(part)) for part in scheme.made} == losses
  assert {part.domain for part in scheme.made if part.attacked} == attacked


@pytest.mark.parametrize("name", TABLE)
def test_what_a_step_changes(name):
  """Every collection of its domains, and every parameter; there are no others."""
  domains, _, _ = TABLE[name]
  _, state, new_state, metrics = one_step(name)
  collections = {"batch_stats" + ("" if i == 0 else f"_{d}") for i, d in enumerate(domains)}
  assert set(state.batch_stats) == collections
  for collection in collections:
    for old, new in zip(*map(jax.tree.leaves, (state.batch_stats[collection],
                                               new_state.batch_stats[collection])), strict=True):
      assert np.any(old != new), collection
  moved = moved_params(state, new_state)
  assert all(moved.values()), moved
  owners = set(jax.tree.leaves(domains_of_params(state.params, domains)))
  assert owners == ({""} if len(domains) == 1 else {"", *domains})
  assert {key for key in metrics if key.startswith("loss/")} == {
      f"loss/{of}" for of, weight in SCHEMES[name].weights.items() if weight}


@pytest.mark.parametrize("name", TABLE)
def test_which_gradient_reaches_which_batch_norms(name):
  """With one part at a time, only its domain's scale and bias, and all that is shared, move."""
  method, state, _, _ = one_step(name)
  for part in method.scheme.made:
    alone = Scheme((dataclasses.replace(part, slots=(None, None)),))
    # As this scheme's only part, in the bank of the whole scheme.
    single = dataclasses.replace(method, scheme=alone)
    new_state, _ = jax.jit(functools.partial(train_step, single))(state, make_batch())
    owners = traverse_util.flatten_dict(domains_of_params(state.params, method.model.domains))
    for path, has_moved in moved_params(state, new_state).items():
      assert has_moved == (owners[path] in ("", part.domain)), path


@pytest.mark.parametrize("name", [
    name if name in ("advprop", "fine_grained") else pytest.param(name, marks=pytest.mark.slow)
    for name in TABLE])
def test_an_epoch_on_the_bundled_data_lowers_every_loss(name, tmp_path):
  one_block.register()
  config = default_config()
  config.scheme, config.model.name = name, "one_block"
  config.attack.num_steps = 1
  config.data.batch_size, config.eval.batch_size = 100, 100
  config.data.test_split = "test[:100]"
  config.optimizer.learning_rate, config.optimizer.schedule = 0.02, "constant"
  config.train.epochs, config.train.log_every, config.train.ema_decay = 1.0, 1, 0.9
  config.checkpoint.every_epochs = config.eval.every_epochs = 0.0
  if name == "fine_grained":
    config.data.second_augment = "autoaugment"
  if name == "fast_advprop":
    config.attack.statistics, config.attack.dropout = "batch", True
  records = []
  with pytest.MonkeyPatch.context() as patch:
    real = train.require_finite
    patch.setattr(train, "require_finite",
                  lambda *given: (real(*given), records.append(given[1])))
    train.train(config, str(tmp_path))
  assert len(records) == (83 if name == "fast_advprop" else 100)  # 100 / 1.2
  for loss in (f"loss/{part}" for part in TABLE[name][1]):
    first, last = (np.mean([m[loss] for m in part]) for part in (records[:5], records[-5:]))
    assert last < 0.85 * first, loss


def test_joint_normalises_both_kinds_as_one_batch():
  """Fails where clean and adversarial images of the shared batch norms are two batches."""
  method, state, new_state, _ = one_step("joint")
  batch = make_batch()
  images = to_model_units(batch["image"])
  attack_key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
  adversarial = attack_images(method.model, state.variables, "clean", method.attack, images,
                              batch["label"], image_keys(attack_key, len(images)))

  def loss(params):
    logits, moved = method.model.apply(
        {"params": params, **state.batch_stats}, jnp.concatenate([images, adversarial]),
        train=True, mutable=["batch_stats"])
    losses = cross_entropy(logits, jnp.tile(batch["label"], 2), 0.1)
    return 2 * jnp.mean(losses), moved

  gradient, moved = jax.jit(jax.grad(loss, has_aux=True))(state.params)
  assert_close(jax.tree.map(lambda a, b: (a - b) / RATE, state.params, new_state.params), gradient,
               atol=1e-4)
  assert_close(new_state.batch_stats, moved)


def test_attacking_both_views():
  """Two adversarial parts of one domain: one batch of twice as many images."""
  scheme = SCHEMES["fine_grained"].adjusted({"adversarial_second": 1.0})
  method = make_method(scheme)
  state, batch = make_state(method), make_batch(8)
  images, second = (to_model_units(batch[name]) for name in ("image", SECOND_VIEW))
  parts = {part.name: {"image": second if part.source == SECOND_VIEW else images}
           for part in scheme.made}
  logits, moved = {}, state.batch_stats
  for names in passes(scheme, method.model):
    own, moved = forward(method, state.params, moved, {name: parts[name] for name in names},
                         jax.random.PRNGKey(0))
    logits |= own
  expected, expected_moved = method.model.apply(
      state.variables, jnp.concatenate([images, second]), domains=("adversarial",), train=True,
      mutable=["batch_stats_adversarial"])
  assert_close(jnp.concatenate([logits["adversarial"], logits["adversarial_second"]]), expected)
  assert_close(moved["batch_stats_adversarial"], expected_moved["batch_stats_adversarial"])
  assert not np.allclose(logits["clean"], logits["autoaugment"])


def test_any_number_of_domains():
  """Four domains by four lines: no code knows how many there are."""
  scheme = Scheme((Part("a", "a"), Part("b", "b", source=SECOND_VIEW),
                   Part("c", "c", attacked=True),
                   Part("d", "d", attacked=True, source=SECOND_VIEW, weight=0.5)))
  method = make_method(scheme)
  state, metrics = jax.jit(functools.partial(train_step, method))(make_state(method), make_batch(8))
  assert set(state.batch_stats) == {"batch_stats", "batch_stats_b", "batch_stats_c",
                                    "batch_stats_d"}
  total = sum(float(metrics[f"loss/{x}"]) * (0.5 if x == "d" else 1) for x in "abcd")
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_fast_advprop_by_hand():
  """Disjoint parts, one attack step that trains, each parameter's gradient a mean over images.

  The plain re-computation sums over images and divides by how much of them reached a parameter, as
  the authors' code does. Fails where the attack's own gradient is left out, where parts overlap,
  or where batch norms of the few adversarial images get a smaller gradient.
  """
  method, state, new_state, _ = one_step("fast_advprop")
  batch = make_batch()
  images, labels = to_model_units(batch["image"]), jnp.asarray(batch["label"])
  last = np.arange(20) % 5 == 4
  attack_key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
  keys = image_keys(attack_key, 20)[last]

  def sum_of_losses(params, x, y, domain, collection, batch_stats):
    logits, moved = method.model.apply({"params": params, **batch_stats}, x, domains=(domain,),
                                       train=True, mutable=[collection])
    return jnp.sum(cross_entropy(logits, y, 0.1)), {**batch_stats, **moved}

  gradient_of = jax.jit(jax.grad(sum_of_losses, (0, 1), has_aux=True), static_argnums=(3, 4))
  auxiliary = ("adversarial", "batch_stats_adversarial")
  start = attacks.start(images[last], keys, method.attack)
  (from_start, ascent), stats = gradient_of(state.params, start, labels[last], *auxiliary,
                                            state.batch_stats)
  adversarial = attacks.project(start + 8 * attacks.PIXEL * jnp.sign(ascent), images[last],
                                method.attack)
  (from_adversarial, _), stats = gradient_of(state.params, adversarial, labels[last], *auxiliary,
                                             stats)
  (from_clean, _), stats = gradient_of(state.params, images[~last], labels[~last], "clean",
                                       "batch_stats", stats)
  counts = {"clean": 16, "adversarial": 4 * 0.5 + 4 * 0.5, "": 16 + 4}
  expected = jax.tree.map(
      lambda clean, begin, end, owner: (clean + 0.5 * begin + 0.5 * end) / counts[owner],
      from_clean, from_start, from_adversarial,
      domains_of_params(state.params, method.model.domains))
  ours = jax.tree.map(lambda a, b: (a - b) / RATE, state.params, new_state.params)
  assert_close(ours, expected, atol=1e-4)
  assert_close(new_state.batch_stats, stats)


def test_fast_advprop_costs_what_vanilla_costs():
  scheme = SCHEMES["fast_advprop"]
  assert math.isclose(scheme.budget, 1.2)
  assert math.isclose(scheme.adjusted({}, one_in=2).budget, 1.5)
  assert [scheme.adjusted({}, one_in=2).share(part) for part in scheme.parts] == [0.5, 0.5]


def test_weights_are_by_part():
  scheme = SCHEMES["advprop"].adjusted({"adversarial": 0.5, "clean": None})
  assert [part.weight for part in scheme.parts] == [1.0, 0.5]
  assert [part.weight for part in SCHEMES["advprop"].parts] == [1.0, 1.0]


FAST = {"scheme": "fast_advprop", "attack.num_steps": 1, "attack.statistics": "batch",
        "attack.dropout": True, "data.batch_size": 60}


@pytest.mark.parametrize(("changes", "says"), [
    ({"scheme": "fine_grained"}, "config.data.second_augment=None"),
    ({"data.second_augment": "autoaugment"}, "config.data.second_augment='autoaugment'"),
    ({"scheme": "fast_advprop"}, "config.attack.num_steps=5"),
    ({"scheme": "fast_advprop", "attack.num_steps": 1}, "config.attack.statistics='running'"),
    ({"attack.name": "gd", "attack.norm": "l2"}, "config.attack.norm='l2'"),
    ({"attack.one_in": 4}, "config.attack.one_in=4"),
    ({"scheme": "vanilla", "loss.weights.adversarial": 1.0}, "config.loss.weights.adversarial=1"),
    ({"loss.weights.clean": 0.0}, "config.loss.weights"),
    ({**FAST, "attack.dropout": False}, "config.attack.dropout=False"),
    ({**FAST, "attack.label_smoothing": 0.5}, "config.attack.label_smoothing=0.5"),
    ({**FAST, "data.batch_size": 64}, "60 or 65 would do"),
    ({**FAST, "model.share_statistics": True}, "config.model.share_statistics"),
    ({**FAST, "loss.weights.adversarial": 0.0}, "deals its images out"),
    ({"loss.weights.adversarial_start": 0.5}, "config.loss.weights.adversarial_start=0.5"),
    ({"scheme": "joint", "model.share_affine": True}, "config.model.share_affine"),
    ({"scheme": "fine_grained", "data.second_augment": "crop_flip"}, "autoaugment, randaugment"),
    ({"attack.norm": "l2", "eval.attack": "gd"}, "config.attack.norm='l2'"),
    ({"attack.name": "ifgsm", "attack.clean_start": 0.5}, "config.attack.clean_start=0.5"),
    ({"attack.name": "gd", "attack.ramp_epochs": 1.0}, "config.attack.ramp_epochs"),
    ({"eval.attack": "fgsm", "eval.num_steps": 3}, "config.eval.num_steps=3"),
    ({"data.name": "folder", "data.train_split": "training"}, "its classes are not those of"),
])
def test_settings_that_do_not_fit_the_scheme(changes, says, tmp_path):
  config = default_config()
  if "data.name" in changes:
    changes = {**changes, "data.dir": str(tmp_path)}
    for path in ("training/a/0.png", "training/b/0.png", "test/b/0.png", "test/c/0.png"):
      class_folders.save(tmp_path / path)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    train.create_experiment(config)
  assert says in str(error.value)


@pytest.mark.parametrize("target", ["random", "least_likely"])
def test_another_label_needs_a_second_class(target, tmp_path):
  for split in ("train", "test"):
    class_folders.save(tmp_path / split / "only" / "0.png")
  config = default_config()
  config.data.name, config.data.dir = "folder", str(tmp_path)
  config.attack.target = target
  with pytest.raises(InputError, match=f"config.attack.target='{target}'"):
    train.create_experiment(config)


@pytest.mark.parametrize("share", ["share_statistics", "share_affine"])
def test_the_two_ablations_of_the_bank(share):
  """Shared statistics with separate scale and bias, and the other way round, train."""
  scheme = SCHEMES["advprop"]
  model = one_block.create(domains=scheme.domains, dropout_rate=0.0, drop_path_rate=0.0,
                           **{share: True})
  method = make_method(scheme, model=model)
  state = make_state(method)
  new_state, _ = jax.jit(functools.partial(train_step, method))(state, make_batch(8))
  names = {"batch_stats"} if share == "share_statistics" else {"batch_stats",
                                                               "batch_stats_adversarial"}
  assert set(new_state.batch_stats) == names
  owners = set(jax.tree.leaves(domains_of_params(state.params, scheme.domains)))
  assert owners == ({""} if share == "share_affine" else {"", "clean", "adversarial"})
  assert all(np.any(a != b) for a, b in zip(
      *map(jax.tree.leaves, (state.params, new_state.params)), strict=True))
