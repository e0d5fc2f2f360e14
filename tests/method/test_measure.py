"""What the evaluation's step says of each image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax.method.attack import Attack
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.measure import Attacker, measure_step, shown_step
from advprop_jax.method.step import to_model_units
from tests import one_block
from tests.small_run import random_variables

IMAGES = 12


def make_batch(images=IMAGES):
  rng = np.random.default_rng(0)
  return {"image": rng.integers(0, 256, (images, 28, 28, 3), np.uint8),
          "label": rng.integers(0, 10, images).astype(np.int32),
          "index": np.arange(images, dtype=np.int32), "mask": np.ones(images, bool)}


@functools.cache
def variables():
  """With logits that are of one size."""
  drawn = random_variables()
  kernel = drawn["params"]["classifier"]["kernel"]
  drawn["params"]["classifier"]["kernel"] = (kernel - kernel.mean(1, keepdims=True)).astype(
      np.float32)
  return drawn


def measured(batch, classes=None, attack=None):
  model = one_block.create(domains=("clean",))
  given = {"variables": variables(),
           "classes": np.ones(10, bool) if classes is None else np.isin(np.arange(10), classes)}
  attacker, of_attack = None, {}
  if attack is not None:
    of_attack = {"variables": variables(),
                 "strength": np.array([attack.epsilon, attack.step_size], np.float32)}
    attacker = Attacker(attack, model)
  shown = jax.jit(functools.partial(shown_step, attacker))(of_attack, batch)
  said = jax.jit(functools.partial(measure_step, model))(given, {**batch, "image": shown})
  return jax.device_get(said)


def test_what_is_said_of_each_image():
  """Fails where an entry is another's, or a top-5 is not among the five likeliest."""
  batch = make_batch()
  logits = np.asarray(one_block.create(domains=("clean",)).apply(
      variables(), to_model_units(batch["image"])))
  order = np.argsort(-logits, axis=-1)
  said = measured(batch)
  np.testing.assert_array_equal(said["said"], order[:, 0])
  np.testing.assert_array_equal(said["top1"], order[:, 0] == batch["label"])
  np.testing.assert_array_equal(said["top5"], (order[:, :5] == batch["label"][:, None]).any(1))
  assert 0 < said["top5"].sum() < IMAGES
  np.testing.assert_allclose(said["loss"], cross_entropy(logits, batch["label"]), rtol=1e-4)
  np.testing.assert_allclose(said["confidence"], np.asarray(jax.nn.softmax(logits)).max(1),
                             rtol=1e-4)


def test_padding_has_no_place():
  """Fails where padding is given the place of an image, or changes what is said of others."""
  batch = make_batch()
  batch["mask"] = np.arange(IMAGES) < 9
  said = measured(batch)
  np.testing.assert_array_equal(said["index"], [*range(9), -1, -1, -1])
  short = measured({name: value[:9] for name, value in batch.items()})
  for name in ("top1", "top5", "loss"):
    np.testing.assert_allclose(said[name][:9], short[name], rtol=1e-5)


def test_classes_that_may_not_be_said():
  """Fails where another class wins, or takes part in the loss."""
  batch, classes = make_batch(), [1, 4, 5, 6, 7, 9]
  batch["label"][:] = 4
  logits = np.array(one_block.create(domains=("clean",)).apply(
      variables(), to_model_units(batch["image"])))
  kept = logits[:, classes]
  said = measured(batch, classes)
  np.testing.assert_array_equal(said["top1"], kept.argmax(1) == 1)
  np.testing.assert_allclose(said["loss"], cross_entropy(jnp.asarray(kept),
                                                         np.ones(IMAGES, int)), rtol=1e-4)


def test_an_attack_depends_on_the_place_in_the_data_alone():
  """Fails where the same image is attacked from another start in another batch."""
  batch, attack = make_batch(8), Attack(epsilon=8.0, num_steps=3)
  halves = [measured({name: value[i:i + 4] for name, value in batch.items()}, attack=attack)
            for i in (0, 4)]
  whole = measured(batch, attack=attack)
  for name, value in whole.items():
    np.testing.assert_allclose(value, np.concatenate([half[name] for half in halves]), rtol=1e-3)
  assert not np.allclose(whole["loss"], measured(batch)["loss"], rtol=1e-3)
