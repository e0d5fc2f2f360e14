"""What is shown of test images is what networks see and say."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.figures import examples, images, runs
from advprop_jax.method.step import to_model_units
from advprop_jax.trained import read_run
from tests.figures.test_runs import read, workdir


@pytest.fixture(scope="module")
def seen(run):
  """What the tiny run makes of its test images, as if it were two networks."""
  _, folder = run
  (group,) = runs.groups_of(runs.read_runs(folder, None))
  other = dataclasses.replace(group, label="other")
  network = read_run(folder)
  return examples.examples([group, other], {group.first.name: network}), network


def test_images_are_attacked_within_the_ball(seen):
  """Fails where the attack is another than the evaluation's, or nothing is attacked."""
  found, _ = seen
  assert found.clean.shape == (8, 28, 28, 3)
  assert found.total == 12
  for adversarial in found.adversarial:
    change = np.abs(adversarial - found.clean)
    assert 0.5 * found.attack.epsilon < change.max() <= found.attack.epsilon + 1e-3
  assert examples.amplification(found) == pytest.approx(127 / found.attack.epsilon, abs=1)
  grey = examples.perturbation(found, 0)
  assert grey.min() >= 0
  assert grey.max() <= 256
  np.testing.assert_array_equal(grey[found.adversarial[0] == found.clean], 128)


def test_networks_say_what_they_say(seen):
  """Fails where an answer is that of other images, or of the auxiliary batch norms."""
  found, network = seen
  for kind, pixels in {"clean": found.clean, 0: found.adversarial[0]}.items():
    logits = network.model.apply(network.deployed, to_model_units(np.float32(pixels)))
    np.testing.assert_array_equal(found.says[kind][0], np.argmax(logits, -1))
    np.testing.assert_array_equal(found.says[kind][1], found.says[kind][0])


def test_gradients_are_those_of_the_brightness(seen):
  """Fails where a map is that of one colour, of another label, or of another image."""
  found, network = seen

  def loss(brighter):
    pixels = to_model_units(found.clean[2:3]) + brighter
    logits = network.model.apply(network.deployed, pixels)
    return -jax.nn.log_softmax(logits)[0, found.truth[2]]

  np.testing.assert_allclose(jax.grad(loss)(0.0), found.gradients[0][2].sum(), rtol=1e-3,
                             atol=1e-5)


def test_saliency_has_one_scale_for_all_networks():
  """Fails where each network's map is scaled by itself, or an image by another."""
  gradient = np.random.default_rng(0).normal(size=(2, 10, 10)) * np.array([1, 50])[:, None, None]
  found = types.SimpleNamespace(gradients=[gradient, 0.1 * gradient])
  strong, weak = examples.saliency(found)
  assert strong.shape == (2, 10, 10, 3)
  np.testing.assert_allclose((weak - 128)[np.abs(strong - 128) < 127],
                             0.1 * (strong - 128)[np.abs(strong - 128) < 127])
  ends = (strong >= 254) | (strong <= 2)
  assert strong.max() <= 255
  for image in ends:
    assert 0 < image.mean() < 0.05
  assert np.sign(strong[0, 0, 0, 0] - 128) == np.sign(gradient[0, 0, 0])
  zeros = types.SimpleNamespace(gradients=[np.zeros((1, 4, 4))])
  np.testing.assert_array_equal(examples.saliency(zeros)[0], 128)


def test_right_and_wrong_have_signs(seen):
  """Fails where a wrong answer can be told by its colour alone."""
  found, _ = seen
  says = {kind: [found.truth, (found.truth + 1) % 10] for kind in found.says}
  made = images._examples_section("title", dataclasses.replace(found, says=says), "")
  kinds = len(says)
  assert made.body.count("✓") == made.body.count("✗") == 8 * kinds
  assert made.body.count("class=wrong") == 8 * kinds
  assert made.body.count('class="card"') == 8
  assert f"of {found.total} test images" in made.captions[0]
  assert str(found.attack) in made.captions[0]


def test_without_the_package_of_corruptions(run, monkeypatch):
  """Fails where an optional package that is missing takes the whole figure with it."""
  def missing(*args):
    raise InputError("a package is missing")

  monkeypatch.setattr(examples, "corrupt", missing)
  (group,) = runs.groups_of(runs.read_runs(run[1], None))
  sections = images.sections([group], {group.first.name: read_run(run[1])})
  assert [panel.name for section in sections for panel in section.panels] == ["examples",
                                                                              "saliency"]
  assert "left out: a package is missing" in sections[0].captions[0]


def test_who_is_shown(tmp_path):
  """Fails where networks are shown images of another size or data, or two of one scheme."""
  settings = [{}, {"scheme": "vanilla"}, {"changes": {"attack.epsilon": 8.0}},
              {"scheme": "joint", "changes": {"data.image_size": 32}},
              {"scheme": "joint", "changes": {"model.name": "resnet_tiny"}},
              {"scheme": "joint", "changes": {"data.test_split": "train"}},
              {"scheme": "adversarial"}]
  groups = runs.groups_of(read(*(workdir(tmp_path / str(place), **each)
                                 for place, each in enumerate(settings))))
  assert [group.first.name for group in examples.shown(groups)] == ["0", "1", "6"]


def test_data_that_is_gone(run, tmp_path):
  """Fails where test images that are no longer there end the report."""
  path = workdir(tmp_path / "a", changes={"data.name": "folder", "data.dir": str(tmp_path / "no")})
  (group,) = runs.groups_of(read(path))
  for section in images.sections([group], {"a": read_run(run[1])}):
    assert "no" in section.reason
    assert not section.panels
