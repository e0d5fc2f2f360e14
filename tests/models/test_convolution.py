"""Convolutions: TensorFlow's padding, and one depthwise convolution in two forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.models.convolution import Convolution, Depthwise, Pointwise
from advprop_jax.models.depthwise import depthwise, depthwise_native, depthwise_shifted

# (images, height, width), kernel, stride: even and odd sides, sides below the kernel's, and
# numbers of images that the groups of the CPU's form do not divide.
SHAPES = [((3, 8, 8), 3, 1), ((3, 8, 7), 3, 2), ((9, 7, 9), 5, 2), ((17, 6, 5), 5, 1),
          ((1, 4, 4), 5, 2), ((2, 1, 3), 3, 2)]


def make_inputs(shape, size, channels=4, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=(*shape, channels)), dtype),
          jnp.asarray(rng.normal(size=(size, size, 1, channels)), dtype))


def depthwise_by_hand(x, kernel, stride):
  """In plain loops, with the padding as TensorFlow's documentation of 'SAME' defines it."""
  size = len(kernel)
  heights, widths = (-(-length // stride) for length in x.shape[1:3])
  top, left = (max((-(-length // stride) - 1) * stride + size - length, 0) // 2
               for length in x.shape[1:3])
  y = np.zeros((len(x), heights, widths, x.shape[3]))
  for r, c, i, j in np.ndindex(heights, widths, size, size):
    row, column = r * stride + i - top, c * stride + j - left
    if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
      y[:, r, c] += x[:, row, column] * kernel[i, j, 0]
  return y


@pytest.mark.parametrize(("shape", "size", "stride"), SHAPES)
def test_depthwise_pads_as_tensorflow_does(shape, size, stride):
  """Fault: PyTorch's symmetric padding, which differs for stride 2 and even sides."""
  x, kernel = make_inputs(shape, size)
  expected = depthwise_by_hand(np.asarray(x), np.asarray(kernel), stride)
  for form in (depthwise_native, depthwise_shifted):
    np.testing.assert_allclose(form(x, kernel, stride), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "size", "stride"), SHAPES)
def test_both_forms_have_the_same_gradients(shape, size, stride):
  """`depthwise` here is the CPU's form, with gradients of its own; the native one has XLA's."""
  x, kernel = make_inputs(shape, size)
  y, backward = jax.vjp(functools.partial(depthwise, stride=stride), x, kernel)
  expected, backward_native = jax.vjp(
      functools.partial(depthwise_native, stride=stride), x, kernel)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  gradient = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
  for ours, theirs in zip(backward(gradient), backward_native(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_second_derivatives_agree():
  x, kernel = make_inputs((2, 4, 4), 3, channels=2)

  def penalty(form, kernel):  # of the input gradient, as gradient regularisation has it
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(form(x, kernel, 2))))(x)
    return jnp.sum(jnp.square(gradient))

  ours, native = (jax.grad(functools.partial(penalty, form))(kernel)
                  for form in (depthwise, depthwise_native))
  np.testing.assert_allclose(ours, native, rtol=1e-3)


def test_bfloat16_is_accumulated_in_float32():
  x, kernel = make_inputs((2, 8, 8), 5, dtype=jnp.bfloat16)
  y = depthwise(x, kernel, 1)
  assert y.dtype == jnp.bfloat16
  exact = depthwise_by_hand(np.asarray(x, np.float64), np.asarray(kernel, np.float64), 1)
  np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2 ** -8, atol=1e-4)


def test_the_form_is_that_of_the_platform_compiled_for():
  """Fault: choosing by the host's backend, so that a TPU program from a CPU host is slow."""
  x, kernel = make_inputs((2, 8, 8), 3)
  gradient = jax.jit(jax.grad(lambda x, kernel: jnp.sum(depthwise(x, kernel, 1)), (0, 1)))

  def grouped(platform):
    text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    return "stablehlo.convolution" in text

  assert {platform: grouped(platform) for platform in ("cpu", "tpu", "cuda")} == {
      "cpu": False, "tpu": True, "cuda": True}


def test_modules_are_the_convolutions_they_name():
  x, _ = make_inputs((2, 7, 8), 3)
  for module, groups in ((Convolution(6, 3, stride=2), 1), (Pointwise(5), 1), (Depthwise(5, 2), 4)):
    variables = module.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    stride = getattr(module, "stride", 1)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    assert set(variables["params"]) == {"kernel"}


def test_bias_starts_at_zero_and_is_added():
  x = jnp.ones((2, 1, 1, 3))
  layer = Pointwise(4, use_bias=True)
  params = layer.init(jax.random.key(0), x)["params"]
  assert not params["bias"].any()
  moved = {**params, "bias": params["bias"] + 2}
  np.testing.assert_allclose(layer.apply({"params": moved}, x),
                             layer.apply({"params": params}, x) + 2, rtol=1e-6)


@pytest.mark.parametrize(("module", "fan_out"), [
    (Convolution(256, 3), 9 * 256), (Pointwise(512), 512), (Depthwise(5), 25)])
def test_kernels_start_with_variance_two_over_fan_out(module, fan_out):
  kernel = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 256)))["params"]["kernel"]
  assert kernel.dtype == jnp.float32
  assert float(kernel.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
  assert abs(float(kernel.mean())) < 0.03 * float(kernel.std())
