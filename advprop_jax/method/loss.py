"""Cross entropy, and what depends on whose a parameter is: weight decay, means over images."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from advprop_jax.method.schemes import Scheme
from advprop_jax.models.batch_norm import domains_of_params


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """The cross entropy of each image, in nats.

  The target is 1 - label_smoothing on the label plus label_smoothing / classes on every class
  (Szegedy et al., CVPR 2016).

  Args:
    logits: (n, classes).
    labels: (n,), integers.
    label_smoothing: in [0, 1].

  Returns:
    (n,), float32.
  """
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  of_label = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
  of_all = jnp.mean(log_probabilities, axis=-1)
  return -(1 - label_smoothing) * of_label - label_smoothing * of_all


def decayed(params: dict, decay_batch_norm: bool = False) -> dict:
  """A tree of booleans: which parameters weight decay is for.

  Args:
    params: of a network of this project.
    decay_batch_norm: whether scales and biases of batch norms are among them.

  Source: the recipe of the paper's networks leaves batch norms alone, and only these
  (tensorflow/tpu, models/official/efficientnet/main.py).
  """
  flat = traverse_util.flatten_dict(params)
  batch_norms = {path[:-1] for path in flat if path[-1].startswith("scale")}
  return traverse_util.unflatten_dict(
      {path: decay_batch_norm or path[:-1] not in batch_norms for path in flat})


def mean_over_images(gradient: dict, scheme: Scheme) -> dict:
  """Each parameter's gradient as a weighted mean over the images that reach it.

  A batch norm's scale and bias are reached by the parts of their domain, all else by all parts. So
  what few images reach moves as fast as what many do.

  Args:
    gradient: of the sum of weight * share of the mini-batch * mean loss, over parts and starts.
    scheme: whose parts they are.

  *Source:* Mei et al., "Fast AdvProp", ICLR 2022, section 3.2, "Synchronizing parameter updating
  speed"; meijieru/fast_advprop, imagenet.py, where each parameter counts its images.
  """
  def images(domain):
    return sum(scheme.coefficient(part, part.weight + part.start_weight)
               for part in scheme.made if domain in (None, part.domain))

  return jax.tree.map(lambda leaf, domain: leaf / images(domain or None), gradient,
                      domains_of_params(gradient, scheme.domains))
