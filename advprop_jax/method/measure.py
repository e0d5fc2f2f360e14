"""What a network says of each image: as it is, or attacked. Pure, per device, as the train step."""

import dataclasses

import jax
import jax.numpy as jnp

from advprop_jax.method.apgd import apgd
from advprop_jax.method.attack import APGD, Attack
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.restarts import strongest
from advprop_jax.method.step import attack_images, to_model_units
from advprop_jax.models.network import Network

TOP = 5
NEVER = -1e9   # logit of a class that may not be said; finite, as 0 * infinity is no number


@dataclasses.dataclass(frozen=True)
class Attacker:
  """Who makes the adversarial images of an evaluation.

  Attributes:
    attack: its settings, but for epsilon and step size, which are arguments of the compiled step.
    model: the network that is attacked, of one domain.
    restarts: attacks of each image, of which the strongest counts.
  """

  attack: Attack
  model: Network
  restarts: int = 1


def shown_step(attacker: Attacker | None, given: dict, batch: dict) -> jax.Array:
  """What the network is shown of this device's part of a batch, (n, h, w, 3), in [-1, 1].

  Args:
    attacker: None for the images as they are. Its random draws depend on the index alone.
    given: for an attacker {"variables": of its model; "strength": float32 (2,), its epsilon and
      step size, 0-255 units}; else empty.
    batch: as of `measure_step`, its images (n, h, w, 3) uint8.
  """
  images = to_model_units(batch["image"])
  if attacker is None:
    return images
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(0), batch["index"])
  return adversarial_images(attacker, given["variables"], given["strength"], images,
                            batch["label"], keys)


def measure_step(model: Network, given: dict, batch: dict, axis_name: str | None = None) -> dict:
  """What the network says of each image of one batch, of all devices.

  Args:
    model: the network, of one domain.
    given: {"variables": of the model; "classes": (logits,) bool, those that may be said}.
    batch: this device's part: {"image": (n, h, w, 3), of `shown_step`; "label": (n,); "mask": (n,),
      False for padding; "index": (n,), the place of each image in the data set}.
    axis_name: the pmapped axis.

  Returns:
    Of the images of all devices, in order: {"index": (N,) int32, -1 for padding; "said": int32, the
    likeliest class; "top1", "top5": bool, whether the label is that class, or among the five
    likeliest; "loss": float32, nats, without label smoothing; "confidence": float32, the
    probability of the likeliest class}.
  """
  labels = batch["label"]
  logits = model.apply(given["variables"], batch["image"]).astype(jnp.float32)
  logits = jnp.where(given["classes"], logits, NEVER)
  _, likeliest = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
  guess = jnp.argmax(logits, axis=-1)
  said = {
      "index": jnp.where(batch["mask"], batch["index"], -1),
      "said": guess, "top1": guess == labels,
      "top5": jnp.any(likeliest == labels[:, None], axis=-1),
      "loss": cross_entropy(logits, labels),
      "confidence": jnp.max(jax.nn.softmax(logits), axis=-1)}
  if axis_name is None:
    return said
  return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), said)


def adversarial_images(attacker: Attacker, variables: dict, strength: jax.Array, images: jax.Array,
                       labels: jax.Array, keys: jax.Array) -> jax.Array:
  """The strongest adversarial images that an attacker finds, (n, h, w, 3), in [-1, 1].

  Args:
    attacker: who.
    variables: of the attacker's model.
    strength: (2,), epsilon and step size, 0-255 units.
    images: (n, h, w, 3), in [-1, 1].
    labels: (n,), the true ones.
    keys: (n, ...), a random key for each image.
  """
  model = attacker.model
  attack = dataclasses.replace(attacker.attack, epsilon=strength[0], step_size=strength[1])

  def logits_of(images):
    return model.apply(variables, images).astype(jnp.float32)

  def attack_once(keys):
    if attack.name == APGD:
      return apgd(logits_of, labels, images, keys, epsilon=attack.epsilon,
                  num_steps=attack.num_steps, norm=attack.norm)
    return attack_images(model, variables, model.domains[0], attack, images, labels, keys)

  def judge(images):
    logits = logits_of(images)
    return cross_entropy(logits, labels), jnp.argmax(logits, axis=-1) != labels

  return strongest(attack_once, judge, keys, attacker.restarts)
