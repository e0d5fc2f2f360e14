"""EfficientNet: the published sizes, and what holds for any network of the project."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax import models
from advprop_jax.errors import InputError
from advprop_jax.models import create_model, efficientnet, network
from tests import one_block

# Trainable parameters with 1000 classes, measured on timm 1.0.31 (the published ones; the tiny
# network, with 10 classes, is this project's own).
PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "efficientnet_b8": 87_413_142,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
    "efficientnet_tiny": 256_184,
}
EFFICIENTNETS = [name for name in models.NAMES if name.startswith("efficientnet")]


def shapes_of(name, **settings):
  model = create_model(name, **{"num_classes": 10 if name.endswith("tiny") else 1000, **settings})
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_number_of_parameters(name):
  assert count(shapes_of(name)["params"]) == PARAMETERS[name]


def test_every_network_has_its_number_of_parameters():
  assert set(EFFICIENTNETS) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "millions"), [("efficientnet_b0", 0.042),
                                                ("efficientnet_b8", 0.38)])
def test_parameters_of_one_auxiliary_bank(name, millions):
  """AdvProp, section 4.1: the auxiliary batch norms are a negligible share of the parameters."""
  domains = ("clean", "adversarial")
  more = count(shapes_of(name, domains=domains)["params"]) - PARAMETERS[name]
  assert more / 1e6 == pytest.approx(millions, rel=0.02)
  assert count(shapes_of(name, domains=domains, share_affine=True)["params"]) == PARAMETERS[name]


def test_b8_is_the_published_one():
  b8 = efficientnet.ARCHITECTURES["efficientnet_b8"]
  assert (b8.stem, b8.head, b8.image_size) == (72, 2816, 672)
  assert [stage.outputs for stage in b8.stages] == [32, 56, 88, 176, 248, 424, 704]
  assert [stage.repeats for stage in b8.stages] == [4, 8, 8, 11, 11, 15, 4]


def test_resolutions_and_total_strides():
  assert [models.image_size(f"efficientnet_b{i}") for i in range(9)] == [
      224, 240, 260, 300, 380, 456, 528, 600, 672]
  assert [models.image_size(f"efficientnet_lite{i}") for i in range(5)] == [224, 240, 260, 280, 300]
  assert (models.image_size("efficientnet_tiny"), models.min_image_size("efficientnet_tiny")) == (
      28, 8)
  assert models.min_image_size("tf_efficientnet_b0") == 32


def test_stochastic_depth_grows_linearly_and_only_on_skips():
  """Fault: a rate on a block without a skip, which would drop the image's whole signal."""
  drops = []

  class Spy(network.Dropout):
    def __call__(self, x, domains):
      drops.append((self.path[0], self.rate))
      return x

  model, original = create_model("efficientnet_b0"), network.Dropout
  network.Dropout = Spy
  try:
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  finally:
    network.Dropout = original
  blocks = efficientnet.block_names(model.architecture)
  expected = {name: 0.2 * i / 16 for i, (name, _, _, stage) in enumerate(blocks)
              if stage.stride == 1 and stage.inputs == stage.outputs}
  assert len(blocks) == 16
  assert dict(drops[:-1]) == pytest.approx(expected)
  assert drops[-1][1] == 0.2  # the classifier's


@pytest.fixture(scope="module")
def small():
  model = one_block.create()
  images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)), jnp.float32)
  return model, jax.jit(model.init)(jax.random.key(0), images), images


def test_dropout_needs_a_key_and_no_mode(small):
  model, variables, images = small
  for train in (False, True):
    still = model.apply(variables, images, train=train)
    np.testing.assert_array_equal(still, model.apply(variables, images, train=train))
    moved = model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(1)})
    assert np.any(moved != still)


def test_rates_can_be_set_to_zero(small):
  _, variables, images = small
  model = one_block.create(dropout_rate=0.0, drop_path_rate=0.0)
  np.testing.assert_array_equal(
      model.apply(variables, images),
      model.apply(variables, images, rngs={"dropout": jax.random.key(1)}))


def test_the_main_domain_is_the_first(small):
  model, variables, images = small
  np.testing.assert_array_equal(model.apply(variables, images),
                                model.apply(variables, images, domains=("clean",)))


def test_bfloat16_computes_in_it_and_keeps_float32(small):
  _, variables, images = small
  model = one_block.create(dtype=jnp.bfloat16)
  new = jax.eval_shape(model.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
  logits = model.apply(variables, images, train=True)
  full = one_block.create().apply(variables, images, train=True)
  assert logits.dtype == full.dtype == jnp.float32
  assert 0 < float(jnp.abs(logits - full).max()) < 0.05 * float(jnp.abs(full).max())


def test_classifier_starts_uniform_and_without_bias():
  model = one_block.create(num_classes=100)
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["classifier"]
  kernel = np.asarray(params["kernel"])
  assert np.abs(kernel).max() <= 0.1
  assert kernel.std() == pytest.approx(0.1 / 3 ** 0.5, rel=0.05)
  assert not params["bias"].any()


@pytest.mark.parametrize("ask", [create_model, models.image_size, models.min_image_size])
def test_unknown_names_are_refused_with_the_known_ones(ask):
  with pytest.raises(InputError, match=r"'efficientnet_b9'.*efficientnet_b0, .*efficientnet_tiny"):
    ask("efficientnet_b9")


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "efficientnet_b0"])
def test_timms_names_are_known(name):
  assert create_model(name) == create_model("efficientnet_b0")


def test_types_are_given_by_name_or_as_such():
  assert create_model("efficientnet_b0", dtype="bfloat16") == create_model(
      "efficientnet_b0", dtype=jnp.bfloat16)
  for dtype in ("float16", "real"):
    with pytest.raises(InputError, match="choose one of float32, bfloat16"):
      create_model("efficientnet_b0", dtype=dtype)
