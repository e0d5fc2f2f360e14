"""Test images as networks see them: attacked, corrupted, and what each network says.

Each network is attacked through its own main batch norms, by one and the same attacker, from the
same random start: what is compared is how networks stand an attack that knows them. What the other
networks say of the same images is shown too, since these were not made against them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax.benchmarks.corruptions import corrupt
from advprop_jax.data.transforms import evaluation_transform
from advprop_jax.errors import InputError
from advprop_jax.experiment import evaluation_attack, open_split
from advprop_jax.figures.runs import Group
from advprop_jax.method.attack import PIXEL, Attack
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.step import attack_images, to_model_units
from advprop_jax.models.network import Network
from advprop_jax.trained import TrainedNetwork

IMAGES, MOST_NETWORKS = 8, 3
SEVERITY = 3
CORRUPTIONS = ("gaussian_noise", "motion_blur", "fog", "jpeg_compression")   # one of each kind
CLIP = 99.0             # percentile of |gradient| that is black or white


@dataclasses.dataclass(frozen=True)
class Examples:
  """Test images, and what networks make of them.

  Attributes:
    labels: of the groups whose first run's network is shown.
    names: of the runs.
    sources: what the weights of each are.
    classes: names of the classes.
    truth: (n,) labels.
    clean: (n, h, w, 3), 0-255.
    corrupted: (n, h, w, 3), 0-255, and the name of each one's corruption; None without package.
    adversarial: for each network (n, h, w, 3), 0-255, not rounded: made against it.
    says: {"clean", "corrupted", place of the attacked network: for each network (n,) classes}.
    gradients: for each network (n, h, w): of the loss by the brightness of a pixel.
    attack: of all networks.
    total: number of test images that they were taken from.
    lacks: why corrupted is None.
  """

  labels: list[str]
  names: list[str]
  sources: list[str]
  classes: list[str]
  truth: np.ndarray
  clean: np.ndarray
  corrupted: tuple[np.ndarray, list[str]] | None
  adversarial: list[np.ndarray]
  says: dict[str | int, list[np.ndarray]]
  gradients: list[np.ndarray]
  attack: Attack
  total: int
  lacks: str = ""


def shown(groups: Sequence[Group]) -> list[Group]:
  """Whose networks can be compared on the same images: those like the first, one of a scheme."""
  first, chosen = groups[0].first, {}
  for group in groups:
    data, other = group.first.full_config.data, first.full_config.data
    alike = all(data[name] == other[name] for name in
                ("name", "test_split", "image_size", "crop_fraction"))
    if alike and group.network == first.facts["network"]:
      chosen.setdefault(group.scheme, group)
  return list(chosen.values())[:MOST_NETWORKS]


def examples(groups: Sequence[Group], networks: Mapping[str, TrainedNetwork | str]) -> Examples:
  """Opens the test images of the first run, and shows some to each network.

  Args:
    groups: as `shown` gives them.
    networks: {name of a run: its network, or why it cannot be read}.

  Raises:
    InputError: a network or the images cannot be read, or their classes differ.
  """
  config = groups[0].first.full_config
  runs = [group.first for group in groups]
  for run in runs:
    if isinstance(networks[run.name], str):
      raise InputError(f"{run.name}: {networks[run.name]}")
  chosen = [networks[run.name] for run in runs]
  source = open_split(config.data, config.data.test_split)
  for run, network in zip(runs, chosen, strict=True):
    if network.class_names != source.class_names:
      raise InputError(f"the test images' classes are not those of {run.name}")
  transform = evaluation_transform(config.data.image_size, config.data.crop_fraction)
  places = np.unique(np.linspace(0, len(source) - 1, min(IMAGES, len(source))).astype(int))
  records = [source[int(place)] for place in places]
  pixels = np.stack([transform(record["image"]) for record in records])
  truth = np.array([record["label"] for record in records])
  attack = evaluation_attack(config)
  corrupted, lacks = _corrupted(pixels, places)
  seen = [_look(network, attack, pixels, truth, places) for network in chosen]
  adversarial, gradients = [each[0] for each in seen], [each[1] for each in seen]
  sets = {"clean": pixels, **({"corrupted": corrupted[0]} if corrupted else {}),
          **dict(enumerate(adversarial))}
  says = {name: [_say(network, images) for network in chosen] for name, images in sets.items()}
  return Examples([group.label for group in groups], [run.name for run in runs],
                  [network.source for network in chosen],
                  [chosen[0].class_name(label) for label in range(chosen[0].num_classes)], truth,
                  pixels, corrupted, adversarial, says, gradients, attack, len(source), lacks)


def _corrupted(pixels, places):
  names = [CORRUPTIONS[number % len(CORRUPTIONS)] for number in range(len(places))]
  try:
    return (np.stack([corrupt(image, name, SEVERITY, (0, int(place)))
                      for image, name, place in zip(pixels, names, places, strict=True)]),
            names), ""
  except InputError as error:
    return None, str(error)


def _look(network: TrainedNetwork, attack: Attack, pixels, truth, places):
  """Adversarial images, 0-255, and gradients, of one network with its main batch norms."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(0), places)
  adversarial, gradient = jax.device_get(_attack_and_gradient(
      network.model, attack, network.deployed, to_model_units(pixels), truth, keys))
  return (adversarial + 1) / PIXEL, gradient


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attack_and_gradient(model: Network, attack: Attack, variables, images, labels, keys):
  def loss(images):
    return jnp.sum(cross_entropy(model.apply(variables, images), labels))

  adversarial = attack_images(model, variables, model.domains[0], attack, images, labels, keys)
  # All colours of a pixel brightened at once: the sum of their derivatives.
  return adversarial, jnp.sum(jax.grad(loss)(images), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Network, variables, images):
  return jnp.argmax(model.apply(variables, images), axis=-1)


def _say(network: TrainedNetwork, images: np.ndarray) -> np.ndarray:
  units = jnp.asarray(images, jnp.float32) * PIXEL - 1
  return np.asarray(_predict(network.model, network.deployed, units))


def amplification(found: Examples) -> int:
  """Factor that makes the perturbations visible: the largest becomes black or white."""
  largest = max(float(np.abs(each - found.clean).max()) for each in found.adversarial)
  return max(int(127 / largest), 1) if largest > 0 else 1


def perturbation(found: Examples, network: int) -> np.ndarray:
  """What the attack adds, amplified, 0-255; 128 is no change."""
  return 128 + amplification(found) * (found.adversarial[network] - found.clean)


def saliency(found: Examples) -> list[np.ndarray]:
  """Gradients as grey, (n, h, w, 3) for each network, 0-255: 128 is 0, white raises the loss.

  For each image all networks have one scale: the CLIP-th percentile of their |gradients| together
  is black or white.
  """
  every = np.abs(np.stack(found.gradients))                   # (networks, n, h, w)
  scale = np.percentile(every, CLIP, axis=(0, 2, 3))[:, None, None]
  grey = [128 + 127 * np.clip(each / np.maximum(scale, 1e-30), -1, 1)
          for each in found.gradients]
  return [np.repeat(each[..., None], 3, axis=-1) for each in grey]
