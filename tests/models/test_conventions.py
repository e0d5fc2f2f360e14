"""Networks read images as they were trained to, and are given all of them in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.method.attack import Attack
from advprop_jax.method.step import attack_images, to_model_units
from advprop_jax.models import create_model
from advprop_jax.models.conventions import CONVENTIONS, convention_named, normalised
from tests import one_block

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 13, 17, 3), np.uint8)


def network(convention):
  """A network whose every parameter is random, and its variables."""
  model = one_block.create(domains=("clean",), input_convention=convention)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 13, 17, 3)))
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 1, leaf.shape), "float32")
                             * (rng.choice([-1, 1], leaf.shape) if leaf.ndim > 1 else 1), shapes)


@pytest.mark.parametrize(("name", "formula"), [
    ("inception", lambda x: x * 2 / 255 - 1),
    ("imagenet", lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
    ("lite", lambda x: (x - 127) / 128)])
def test_numbers_that_a_network_reads(name, formula):
  """Fails where mean and deviation are mixed up, or taken for those of images in [-1, 1]."""
  ours = normalised(to_model_units(jnp.asarray(PIXELS)), name)
  np.testing.assert_allclose(ours, formula(PIXELS.astype(np.float64)), atol=2e-6)
  convention = CONVENTIONS[name]
  assert convention_named(convention.mean, convention.std) == name


def test_a_mean_that_nobody_knows():
  with pytest.raises(InputError, match=r"\(0.1, 0.2, 0.3\).*inception"):
    convention_named((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_network_normalises_by_itself(name):
  """Fails where the convention does not get to the first convolution, or is applied twice."""
  model, variables = network(name)
  images = to_model_units(jnp.asarray(PIXELS))
  plain, _ = network("inception")
  np.testing.assert_allclose(model.apply(variables, images),
                             plain.apply(variables, normalised(images, name)), rtol=1e-5)


@pytest.mark.parametrize("name", ["imagenet", "lite"])
def test_on_the_device_and_folded_into_the_first_convolution_agree(name):
  """Kernel times scale, plus a bias, where the border is padded with the convention's zero.

  Fails where the border is padded before the normalisation, which is what folding alone would do.
  """
  model, variables = network(name)
  images = to_model_units(jnp.asarray(PIXELS))
  scale, shift = (np.array(x) for x in (CONVENTIONS[name].scale, CONVENTIONS[name].shift))

  def on_the_device(images):
    _, state = model.apply(variables, images, capture_intermediates=lambda m, _: m.name == "stem",
                           mutable=["intermediates"])
    return state["intermediates"]["stem"]["__call__"][0]

  kernel = variables["params"]["stem"]["kernel"]
  folded, bias = kernel * scale[:, None], jnp.einsum("hwio,i->o", kernel, shift)

  def in_the_convolution(images, border):
    stride, size = one_block.ARCHITECTURE.stem_stride, kernel.shape[0]
    pads = [(max((-(-n // stride) - 1) * stride + size - n, 0)) for n in images.shape[1:3]]
    pads = [(0, 0), *[(pad // 2, pad - pad // 2) for pad in pads], (0, 0)]
    inside = jnp.pad(jnp.ones_like(images), pads)
    padded = jnp.where(inside > 0, jnp.pad(images, pads), border)
    return bias + jax.lax.conv_general_dilated(
        padded, folded, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  neutral = jnp.asarray(-shift / scale, jnp.float32)
  np.testing.assert_allclose(on_the_device(images), in_the_convolution(images, neutral),
                             rtol=1e-4, atol=1e-4)
  assert np.abs(on_the_device(images) - in_the_convolution(images, jnp.zeros(3))).max() > 1e-3
  weights = np.random.default_rng(2).normal(size=on_the_device(images).shape)
  gradients = [jax.grad(lambda x, f=f: jnp.sum(weights * f(x)))(images) for f in (
      on_the_device, lambda x: in_the_convolution(x, neutral))]
  np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_epsilon_means_the_same_for_every_convention(name):
  """Fails where an attack works on normalised images: an epsilon of 2 then is another number."""
  model, variables = network(name)
  images = to_model_units(jnp.asarray(PIXELS))
  attack = Attack(name="pgd", epsilon=2.0, step_size=2.0, num_steps=3)
  keys = jax.random.split(jax.random.key(0), 2)
  adversarial = attack_images(model, variables, "clean", attack, images, jnp.array([1, 2]), keys)
  difference = np.abs(np.asarray(adversarial - images)) * 255 / 2
  assert difference.max() <= 2 + 1e-4
  assert np.mean(difference > 1.99) > 0.5
  assert np.abs(adversarial).max() <= 1


def test_a_convention_that_is_not_there():
  with pytest.raises(InputError, match=r"input_convention='imagnet'.*imagenet"):
    create_model("efficientnet_tiny", input_convention="imagnet")
