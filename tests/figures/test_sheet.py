"""The picture shows what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.data.transforms import evaluation_transform
from advprop_jax.evaluate import subject_of
from advprop_jax.figures import sheet
from advprop_jax.measure import Measurer
from advprop_jax.method.step import attack_images, to_model_units
from tests.test_evaluate import IMAGES, distinct_variables, small_experiment


def draw(change, epsilon):
  clean = np.full((3, 8, 8, 3), 100.0)
  line = [("label", sheet.INK)] * 3
  image = sheet.panel(clean, clean + change, epsilon, "title", sheet.Captions([line], [line]))
  return np.asarray(image)


def cells(image, value):
  """Number of pixels of exactly this grey."""
  return int(np.sum(np.all(image == value, axis=-1)))


def test_no_change_is_grey():
  image = draw(0.0, 4.0)
  assert 0 <= cells(image, 128) - 3 * sheet.CELL ** 2 < 500  # the edges of letters are grey too
  assert cells(image, 100) >= 6 * sheet.CELL ** 2        # clean and adversarial alike


def test_the_factor_makes_the_ball_as_large_as_the_range():
  """A perturbation of +epsilon is nearly white, -epsilon nearly black, at any epsilon."""
  for epsilon in (2.0, 4.0, 16.0):
    factor = int(127 / epsilon)
    for sign in (1, -1):
      value = 128 + factor * epsilon * sign
      assert 1 <= abs(value - (255 if sign > 0 else 0)) <= 16
      assert 0 <= cells(draw(sign * epsilon, epsilon), value) - 3 * sheet.CELL ** 2 < 500


def test_long_names_are_cut():
  line = [("a very long name of a class that does not fit", sheet.INK)] * 3
  pixels = np.zeros((3, 8, 8, 3))
  sheet.panel(pixels, pixels, 0.0, "title", sheet.Captions([line], [line]))


@functools.cache
def attacked_by_hand(domain, columns=8):
  """Adversarial images in 0-255, labels, and {domain: predictions}, of images spread over the set.
  """
  experiment, variables = small_experiment(), distinct_variables()
  model, transform = experiment.method.model, evaluation_transform(28)
  places = np.linspace(0, IMAGES - 1, columns).astype(int)
  records = [experiment.test_source[i] for i in places.tolist()]
  images = to_model_units(np.stack([transform(record["image"]) for record in records]))
  labels = np.array([record["label"] for record in records])
  keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(0), i) for i in places.tolist()])
  attack = functools.partial(attack_images, model, variables, domain, experiment.eval_attack)
  adversarial = jax.jit(attack)(images, labels, keys)
  guesses = {name: np.argmax(jax.jit(functools.partial(model.apply, domains=(name,)))(
      variables, adversarial), axis=-1) for name in ("clean", "adversarial")}
  return (np.asarray(adversarial) + 1) * 127.5, labels, guesses


@pytest.mark.parametrize(("domain", "attacked", "other", "said"), [
    ("adversarial", "adversarial", "clean", "auxiliary"), (None, "clean", "adversarial", "main")])
def test_the_attack_goes_through_the_batch_norms_of_the_caption(monkeypatch, domain, attacked,
                                                                other, said):
  """Fails where the title names other batch norms than those that were attacked.

  So does it where a line below the images is what the network says through others.
  """
  panels, panel = [], sheet.panel

  def keep(*arguments):
    panels.append(arguments)
    return panel(*arguments)

  monkeypatch.setattr(sheet, "panel", keep)
  experiment = small_experiment()
  subject = dataclasses.replace(subject_of(experiment), auxiliary=domain)
  sheet.adversarial_picture(subject, distinct_variables(),
                            Measurer(experiment.method.model, experiment.config),
                            sheet.examples_of(subject))
  (clean, adversarial, epsilon, title, captions), = panels
  expected, labels, guesses = attacked_by_hand(attacked)
  assert f"through the {said} BN" in title
  assert "PGD-3, epsilon 24, step 8 of 255" in title
  assert epsilon == 24
  assert np.mean(np.abs(adversarial - expected) < 0.01) > 0.99
  assert np.mean(np.abs(adversarial - attacked_by_hand(other)[0]) < 0.01) < 0.8
  assert np.max(np.abs(adversarial - clean)) <= 24 * (1 + 1e-5)

  names = experiment.train_source.class_names
  assert captions.clean[0] == [(names[label], sheet.INK) for label in labels]
  through = {"main": guesses["clean"], "auxiliary": guesses["adversarial"]}
  lines = [[(f"{kind}: {names[guess]}", sheet.RIGHT if guess == label else sheet.WRONG)
            for guess, label in zip(through[kind], labels, strict=True)]
           for kind in (("main", "auxiliary") if domain else ("main",))]
  assert captions.adversarial == lines
  assert np.any(through["main"] != through["auxiliary"])
