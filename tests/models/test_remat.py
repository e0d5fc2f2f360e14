"""A network that computes its blocks again for a gradient is the network that keeps them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.method.attack import Attack
from advprop_jax.method.step import attack_images
from advprop_jax.models import create_model, efficientnet, resnet
from tests import one_block

DOMAINS = ("clean", "adversarial")
FAMILIES = {
    "efficientnet": functools.partial(efficientnet.EfficientNet, one_block.ARCHITECTURE),
    "resnet": functools.partial(resnet.ResNet, resnet.Architecture(
        8, (1, 1), stem=4, bottleneck=False, small_images=True, drop_path_rate=0.4,
        dropout_rate=0.2, zero_init_residual=False)),
}
IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_statistics_are_those_without_remat(family):
  """In training, with dropout and stochastic depth, only the named statistics moving.

  Fails with other masks in the second computation than in the first, with statistics that move
  in both or in none, or with other names, so that a checkpoint of the one is none of the other.
  """
  networks = [FAMILIES[family](10, DOMAINS, remat=remat) for remat in (False, True)]
  kept, recomputed = [jax.eval_shape(network.init, jax.random.key(0), IMAGES)
                      for network in networks]
  assert jax.tree.structure(kept) == jax.tree.structure(recomputed)
  assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, recomputed)
  variables = jax.jit(networks[0].init)(jax.random.key(0), IMAGES)

  def passed(network, variables, key):
    def loss(params):
      logits, moved = network.apply(
          {**variables, "params": params}, IMAGES, domains=("adversarial",), train=True,
          mutable=["batch_stats_adversarial"], rngs={"dropout": key})
      return jnp.sum(jnp.sin(logits)), (logits, moved)

    gradient, (logits, moved) = jax.grad(loss, has_aux=True)(variables["params"])
    return {"logits": logits, "gradient": gradient, "moved": moved}

  run = jax.jit(passed, static_argnums=0)
  keys = [jax.random.key(i) for i in range(2)]
  theirs, ours = [[run(network, variables, key) for key in keys] for network in networks]
  for one, other in zip(theirs, ours, strict=True):
    scale = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(one["gradient"]))
    assert set(other["moved"]) == {"batch_stats_adversarial"}
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-6 * scale, err_msg=str(path))
  assert not np.allclose(ours[0]["logits"], ours[1]["logits"])  # the key is not lost in a block
  moved = ours[0]["moved"]["batch_stats_adversarial"]["stage_1_block_1"]
  assert all(np.any(np.asarray(norm["mean"]) != 0) for norm in moved.values())


def test_the_attack_s_gradient_computes_blocks_again_too():
  """Fails where only the training pass saves memory: the attack's is as large as one of its two."""
  keys, labels = jax.random.split(jax.random.key(0), len(IMAGES)), np.arange(len(IMAGES))
  found = []
  for remat in (False, True):
    network = FAMILIES["resnet"](10, DOMAINS, remat=remat)
    variables = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
    traced = jax.make_jaxpr(lambda variables, network=network: attack_images(
        network, variables, "adversarial", Attack(num_steps=3), IMAGES, labels, keys))(variables)
    found.append(str(traced).count("prevent_cse=True"))  # a parameter of jax.checkpoint's equation
  assert found == [0, 2]  # blocks, in the one loop over steps


def test_a_gradient_keeps_less():
  """The bytes between forward and backward, as traced; XLA's own savings come on top of either."""
  def kept(remat, images):
    network = create_model("resnet_tiny", 10, remat=remat)
    images = jax.ShapeDtypeStruct((images, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def pull_back(variables, images):
      def logits(params):
        return network.apply({**variables, "params": params}, images, train=True)
      return jax.vjp(logits, variables["params"])[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull_back, variables, images))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in residuals)

  plain, again = [kept(remat, 2) - kept(remat, 1) for remat in (False, True)]
  assert plain > 3 * again > 0
