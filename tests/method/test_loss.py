"""Cross entropy against a transcription, and what weight decay is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from advprop_jax.method.loss import cross_entropy, decayed
from tests import one_block


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_the_library_s(smoothing):
  logits = jax.random.normal(jax.random.PRNGKey(0), (6, 10)) * 5
  labels = jnp.arange(6)
  soft = optax.smooth_labels(jax.nn.one_hot(labels, 10), smoothing)
  np.testing.assert_allclose(cross_entropy(logits, labels, smoothing),
                             optax.softmax_cross_entropy(logits, soft), rtol=1e-5)


def test_cross_entropy_of_low_precision_logits_is_computed_in_float32():
  logits = jnp.asarray([[100.0, 0.0, -100.0]], jnp.bfloat16)
  loss = cross_entropy(logits, jnp.array([1]))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, 100.0)


def test_weight_decay_leaves_batch_norms_alone():
  """Fails where scales or biases of batch norms decay, main or auxiliary, or kernels do not."""
  params = jax.eval_shape(one_block.create().init, jax.random.PRNGKey(0),
                          jnp.zeros((1, 28, 28, 3)))["params"]
  flat = traverse_util.flatten_dict(decayed(params))
  norms = {path for path in flat if any(part.endswith("norm") for part in path)}
  assert {path[-1] for path in norms} == {"scale", "bias", "scale_adversarial", "bias_adversarial"}
  assert {path for path, decays in flat.items() if not decays} == norms
  assert all(traverse_util.flatten_dict(decayed(params, decay_batch_norm=True)).values())
