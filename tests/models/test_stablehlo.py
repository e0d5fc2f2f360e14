"""The deployed network as one StableHLO program: any number of images, any platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from advprop_jax.method.step import to_model_units
from advprop_jax.models import create_model

PLATFORMS = ("cpu", "cuda", "tpu")
NAMES = ("efficientnet_tiny", "resnet_tiny")


@functools.cache
def classifier(name):
  """(n, 32, 32, 3) uint8 -> logits, by a network whose every variable makes a difference."""
  model = create_model(name, num_classes=10, domains=("clean",))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)

  def some(path, leaf):
    if leaf.ndim > 1:
      deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5
      return jnp.asarray(deviation * rng.normal(size=leaf.shape), jnp.float32)
    low, high = (0.5, 1.5) if path[-1].key in ("scale", "var") else (-0.2, 0.2)
    return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

  variables = jax.tree_util.tree_map_with_path(some, shapes)
  return jax.jit(lambda images: model.apply(variables, to_model_units(images)))


@functools.cache
def exported(name):
  images = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 32, 32, 3"), jnp.uint8)
  return export.export(classifier(name), platforms=PLATFORMS)(images)


@functools.cache
def loaded(name):
  return export.deserialize(exported(name).serialize())


def make_images(number):
  return np.random.default_rng(number).integers(0, 256, (number, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_one_file_is_the_network_for_any_number_of_images(name):
  """Fault: the number of images of the trace stays in the program, in a reshape or a loop."""
  call = jax.jit(loaded(name).call)
  for number in (1, 3, 8):
    images = make_images(number)
    expected, logits = classifier(name)(images), call(images)
    assert (logits.shape, logits.dtype) == ((number, 10), jnp.float32)
    assert np.std(expected, axis=1).min() > 0.1  # else any logits would do
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_what_it_runs_on_and_takes(name):
  program = loaded(name)
  assert program.platforms == PLATFORMS
  assert program.nr_devices == 1
  (images,), (logits,) = program.in_avals, program.out_avals
  assert (str(images.shape), images.dtype) == ("(batch, 32, 32, 3)", jnp.uint8)
  assert (str(logits.shape), logits.dtype) == ("(batch, 10)", jnp.float32)
  with pytest.raises(ValueError, match="shape"):
    program.call(np.zeros((1, 28, 28, 3), np.uint8))


def test_no_platform_is_sent_to_a_foreign_library():
  """Fault: a custom call, which JAX does not promise to keep."""
  for name in NAMES:
    lines = exported(name).mlir_module().splitlines()
    assert {line.split("@")[1].split("(")[0] for line in lines if "custom_call @" in line} == {
        "shape_assertion"}


def test_each_platform_has_its_form_of_the_depthwise_convolution():
  """Faults: the form of the host that exports for all; or the native form, slow, on the CPU."""
  program = exported("efficientnet_tiny")
  groups = [16, 64, 96, 160, 320, 384]  # the channels of the depthwise convolutions, each once
  assert all(f"feature_group_count = {n} : i64" in program.mlir_module() for n in groups)

  compiled = jax.jit(program.call).lower(make_images(2)).compile().as_text()
  assert "feature_group_count" not in compiled
  assert "conditional" not in compiled  # the platform is settled when the program is compiled
