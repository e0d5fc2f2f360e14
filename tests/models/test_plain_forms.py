"""What was written for speed is what is plainly written, in float64: results and gradients.

The plain form is the formula, differentiated by JAX, or XLA's own convolution.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advprop_jax.method.step import norm
from advprop_jax.models import convolution, dense, depthwise
from advprop_jax.models.activation import swish
from advprop_jax.models.batch_norm import BatchNorm, affine_map, normalise
from advprop_jax.models.channels import channel_sums, once, scale_channels
from advprop_jax.models.pooling import max_pool

TOLERANCE = 1e-10


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def require_equal(function, plain, *inputs):
  """Results, and the gradients of all inputs for a random gradient of the results."""
  y, backward = jax.vjp(function, *inputs)
  expected, backward_plain = jax.vjp(plain, *inputs)
  assert y.dtype == jnp.float64
  np.testing.assert_allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
  gradient = jnp.asarray(np.random.default_rng(1).normal(size=y.shape))
  for ours, theirs in zip(backward(gradient), backward_plain(gradient), strict=True):
    scale = float(jnp.max(jnp.abs(theirs)))
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def normalise_plainly(parts, scale, bias, epsilon, shared):
  """Ioffe and Szegedy's formulas, for JAX to differentiate."""
  axes = (0, 1, 2, 3) if shared else (1, 2, 3)
  mean, var = jnp.mean(parts, axes, keepdims=True), jnp.var(parts, axes, keepdims=True)
  shape = (len(parts), 1, 1, 1, parts.shape[-1])
  return ((parts - mean) / jnp.sqrt(var + epsilon)) * scale.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize("shared", [False, True])
def test_normalise(shared):
  """Faults: a gradient that takes the statistics for constants, or that pools domains which have
  statistics of their own."""
  def pooled(means):
    return jnp.broadcast_to(jnp.mean(means, -2, keepdims=True), means.shape) if shared else means

  parts, scale, bias = arrays((2, 3, 4, 5, 6), (2, 6), (2, 6))
  require_equal(lambda *inputs: normalise(*inputs, 1e-3, pooled)[0],
                functools.partial(normalise_plainly, epsilon=1e-3, shared=shared),
                3 * parts + 7, scale, bias)


def test_normalise_gives_the_statistics_that_it_used():
  parts, scale, bias = arrays((2, 3, 4, 5, 6), (2, 6), (2, 6))
  y, mean, var = normalise(parts, scale, bias, 1e-3, lambda means: means)
  np.testing.assert_allclose(mean, np.mean(parts, (1, 2, 3)), rtol=1e-12)
  np.testing.assert_allclose(var, np.var(parts, (1, 2, 3)), rtol=1e-12)
  expected = affine_map(parts, mean, scale / jnp.sqrt(var + 1e-3), bias)
  np.testing.assert_allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_normalise_over_replicas_that_share_statistics():
  """Two replicas, normalised as one, are one batch; each one's loss counts for all images."""
  parts, scale, bias, gradient = arrays((2, 6, 4, 5, 3), (2, 3), (2, 3), (2, 6, 4, 5, 3))

  def one(parts, gradient):
    def pooled(means):
      return jax.lax.pmean(means, "pair")

    y, backward = jax.vjp(lambda *inputs: normalise(*inputs, 1e-3, pooled)[0], parts, scale, bias)
    return y, *backward(gradient)

  halves = (jnp.stack(jnp.split(x, 2, axis=1)) for x in (parts, gradient))
  y, of_parts, of_scale, of_bias = jax.vmap(one, axis_name="pair")(*halves)
  ours = (jnp.concatenate(list(y), 1), jnp.concatenate(list(of_parts), 1), jnp.sum(of_scale, 0),
          jnp.sum(of_bias, 0))
  expected, backward = jax.vjp(
      functools.partial(normalise_plainly, epsilon=1e-3, shared=False), parts, scale, bias)
  for mine, theirs in zip(ours, (expected, *backward(gradient)), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_swish():
  x, = arrays((7, 1001))
  require_equal(swish, jax.nn.silu, 8 * x)


# Pixels of each sum: 1 and 11, which are not added up by neighbours; 66, by 6; 32, by 8; 49, by 7.
@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (2, 11, 1, 5), (1, 3, 11, 2, 5), (2, 1, 8, 4, 5),
                                   (3, 7, 7, 5)])
def test_channel_sums(shape):
  x, = arrays(shape)
  require_equal(channel_sums, lambda x: x.sum(tuple(range(1, x.ndim - 1))), x)


def test_scale_channels():
  x, scale = arrays((3, 6, 7, 5), (3, 1, 1, 5))
  require_equal(scale_channels, lambda x, scale: x * scale, x, scale)


def test_scale_channels_sums_bfloat16_in_float32():
  """Fault: a partial sum in bfloat16, in which 256 + 1 is 256."""
  x, scale = jnp.ones((1, 64, 64, 3), jnp.bfloat16), jnp.ones((1, 1, 1, 3), jnp.bfloat16)
  of_scale = jax.jit(lambda *inputs: jax.vjp(scale_channels, *inputs)[1](x)[1])(x, scale)
  assert of_scale.dtype == jnp.bfloat16
  np.testing.assert_array_equal(of_scale.astype(jnp.float32), 4096)


def gradient_of_kernel(x):
  flat = x.reshape(-1, 3)
  return jax.grad(lambda kernel: jnp.sum(dense.pointwise(flat, kernel)))(flat[:3, :2])


def gradient_of_scale(x):
  return jax.grad(lambda scale: jnp.sum(scale_channels(x, scale)))(x[:, :1, :1])


def gradient_of_image(x):
  return jax.grad(lambda x: jnp.sum(dense.dense(x, jnp.ones((3, 3, 3, 4), x.dtype), 2)))(x)


def gradient_of_feature_map(x):
  x = jnp.concatenate([x, x], -1)                  # more channels than an image has
  return jax.grad(lambda x: jnp.sum(dense.dense(x, jnp.ones((3, 3, 6, 4), x.dtype))))(x)


def gradient_of_wide_kernel(x):                    # which needs no transposition
  x = jnp.concatenate([x, x], -1)
  return jax.grad(lambda kernel: jnp.sum(dense.dense(x, kernel)))(jnp.ones((3, 3, 6, 20), x.dtype))


def gradient_of_pooled(x):
  return jax.grad(lambda x: jnp.sum(max_pool(x, 3, 2)))(x)


def norm_of_two(x):
  return norm([x, x])


@pytest.mark.parametrize(("function", "fence"), [
    (channel_sums, "dot_general"), (gradient_of_scale, "dot_general"),
    (once, "optimization_barrier"), (gradient_of_image, "optimization_barrier"),
    (gradient_of_kernel, "optimization_barrier"),
    (gradient_of_feature_map, "optimization_barrier"),
    (gradient_of_wide_kernel, "optimization_barrier"),
    (gradient_of_pooled, "optimization_barrier"), (norm, "optimization_barrier"),
    (norm_of_two, "concatenate")])
def test_other_platforms_fuse_as_they_like(function, fence):
  """Fault: a program for a TPU that has to write and read what it would fuse."""
  def fenced(platform):
    lowered = jax.jit(function).trace(jnp.ones((2, 8, 8, 3))).lower(lowering_platforms=(platform,))
    return fence in lowered.as_text()

  assert {platform: fenced(platform) for platform in ("cpu", "tpu", "cuda")} == {
      "cpu": True, "tpu": False, "cuda": False}


@pytest.mark.parametrize("shapes", [[(3, 5), (64, 65), (7,)], [(5,)], [(70, 70), (4097,)]])
def test_norm_of_small_and_large_arrays(shapes):
  require_equal(lambda *tree: norm(tree), lambda *tree: optax.tree.norm(tree), *arrays(*shapes))


# (images, height, width, channels), kernel, stride. Three are cut into bands of rows, then two into
# blocks of channels; the last is of as large a kernel, but of channels that no block divides.
DEPTHWISE = [((3, 8, 7, 4), 3, 2), ((17, 6, 5, 4), 5, 1), ((9, 7, 9, 4), 5, 2),
             ((2, 5, 8, 3), 1, 3), ((2, 32, 28, 64), 3, 1), ((3, 21, 25, 130), 5, 1),
             ((2, 47, 44, 128), 5, 2), ((2, 5, 4, 480), 5, 1), ((2, 7, 5, 352), 5, 2),
             ((1, 4, 3, 331), 5, 1)]


@pytest.mark.parametrize(("shape", "size", "stride"), DEPTHWISE)
def test_depthwise(shape, size, stride):
  x, kernel = arrays(shape, (size, size, 1, shape[-1]))
  require_equal(functools.partial(depthwise.depthwise, stride=stride),
                functools.partial(depthwise.depthwise_native, stride=stride), x, kernel)


def test_pieces_and_blocks_are_what_these_shapes_are_cut_into():
  """Or the test above would not reach them."""
  pieces = [depthwise.pieces_of(batch, -(-height // stride), -(-width // stride), channels)
            for (batch, height, width, channels), _, stride in DEPTHWISE]
  assert pieces == [(3, 1), (16, 1), (9, 1), (2, 1), (2, 8), (1, 7), (2, 8), (2, 1), (2, 1), (1, 1)]
  blocks = [depthwise.block_of(size * size, shape[-1]) for shape, size, _ in DEPTHWISE]
  assert blocks == [4, 4, 4, 3, 64, 130, 128, 48, 32, 331]


# (images, height, width, channels), features; in the second the weight gradient is transposed.
@pytest.mark.parametrize(("shape", "features"), [((3, 5, 4, 6), 7), ((3, 5, 4, 6), 2),
                                                 ((1, 2, 2, 6), 2)])
def test_pointwise(shape, features):
  x, kernel = arrays(shape, (1, 1, shape[-1], features))
  require_equal(
      lambda x, kernel: convolution.Pointwise(features, dtype=jnp.float64).apply(
          {"params": {"kernel": kernel}}, x),
      lambda x, kernel: jax.lax.conv_general_dilated(
          x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")), x, kernel)


@pytest.mark.parametrize(("pixels", "channels", "features", "transposed"), [
    (60, 7, 3, "gradient"), (60, 3, 7, "image"), (60, 7, 7, "image"), (5, 7, 3, "image")])
def test_the_narrower_of_many_pixels_is_transposed(pixels, channels, features, transposed):
  """Or the CPU takes up to 2.4 times as long; both forms give the same numbers."""
  x, kernel = arrays((pixels, channels), (channels, features))
  program = jax.jit(jax.grad(lambda kernel: jnp.sum(dense.pointwise(x, kernel)))).lower(kernel)
  product = {"gradient": f"tensor<{features}x{channels}xf64>",
             "image": f"tensor<{channels}x{features}xf64>"}
  results = [line.rpartition("-> ")[2] for line in program.as_text().splitlines()
             if "stablehlo.dot_general" in line]
  assert product[transposed] in results
  assert ("optimization_barrier" in program.as_text()) == (transposed == "gradient")


def test_one_pass_of_two_domains_is_two_passes():
  """Through what a block is made of, in training: fails where a domain's images move another's."""
  norm = BatchNorm(("clean", "adversarial"), dtype=jnp.float64)
  fresh = norm.init(jax.random.key(0), jnp.zeros((2, 4, 4, 6)), ("clean",), True)
  names = sorted(fresh["params"])

  def block(x, domains, kernel, taps, *affine):
    params = dict(zip(names, affine, strict=True))
    x = convolution.Pointwise(6, dtype=jnp.float64).apply({"params": {"kernel": kernel}}, x)
    x = norm.apply({**fresh, "params": params}, x, domains, True)
    return depthwise.depthwise(swish(x), taps, 2)

  def one(a, b, *weights):
    return block(jnp.concatenate([a, b]), ("clean", "adversarial"), *weights)

  def two(a, b, *weights):
    return jnp.concatenate([block(a, ("clean",), *weights), block(b, ("adversarial",), *weights)])

  require_equal(one, two, *arrays((3, 8, 7, 4), (3, 8, 7, 4), (1, 1, 4, 6), (3, 3, 1, 6),
                                  *[(6,)] * len(names)))


def test_swish_keeps_small_gradients_in_bfloat16():
  """Fails where the sigmoid is rounded before it is subtracted."""
  x = jnp.linspace(-12, 12, 97).astype(jnp.bfloat16)
  ours = jax.jit(jax.grad(lambda x: jnp.sum(swish(x).astype(jnp.float32))))(x)
  exact = jax.grad(lambda x: jnp.sum(jax.nn.silu(x)))(x.astype(jnp.float64))
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.astype(jnp.float64), exact, rtol=0.01, atol=1e-5)


def test_second_derivatives_of_a_batch_norm():
  """Fails where the gradient of the gradient takes the statistics for constants."""
  parts, scale, bias, weights = arrays((1, 4, 3, 2, 5), (1, 5), (1, 5), (1, 4, 3, 2, 5))

  def of_images(form):
    return jax.grad(lambda parts: jnp.sum(weights * jnp.sin(form(parts))))

  require_equal(of_images(lambda parts: normalise(parts, scale, bias, 1e-3, lambda m: m)[0]),
                of_images(lambda parts: normalise_plainly(parts, scale, bias, 1e-3, False)), parts)


def test_a_kernel_that_is_not_finite_is_not_hidden():
  """The branch that fences the sum of taps asks whether the kernel's first number is one."""
  x, kernel = arrays((2, 5, 6, 3), (3, 3, 1, 3))
  for value in (np.nan, np.inf):
    y = depthwise.depthwise(x, kernel.at[0, 0, 0, 0].set(value), 1)
    assert not np.isfinite(y[..., 0]).any()
    assert value != np.inf or np.isfinite(y[..., 1:]).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (7, 2), (1, 2)])
@pytest.mark.parametrize("channels", [dense.FEW - 1, dense.FEW + 1])
def test_dense(channels, size, stride, symmetric):
  x, kernel = arrays((3, 11, 8, channels), (size, size, channels, 6))
  padding = [(size // 2, size // 2)] * 2 if symmetric else "SAME"

  def native(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))

  require_equal(lambda x, kernel: dense.dense(x, kernel, stride, symmetric), native,
                x, kernel)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("shape", "size", "stride"), [((2, 8, 8, 3), 3, 2), ((3, 11, 8, 5), 3, 2),
                                                       ((2, 7, 5, 3), 3, 1), ((2, 9, 10, 3), 5, 3)])
def test_max_pool(shape, size, stride, ties):
  """Fault: a gradient that goes to each of several greatest values, such as a ReLU's zeros, or to
  the last of them."""
  x, = arrays(shape)
  require_equal(lambda x: max_pool(x, size, stride),
                lambda x: nn.max_pool(x, (size, size), (stride, stride), [(size // 2,) * 2] * 2),
                jnp.maximum(jnp.round(x), 0) if ties else x)


def test_an_even_max_pool_is_refused():
  with pytest.raises(ValueError, match="size of a max-pool's window: 2; an odd one is needed"):
    max_pool(jnp.ones((1, 4, 4, 1)), 2, 2)


def test_second_derivatives_of_a_max_pool():
  x, weights = arrays((2, 7, 6, 3), (2, 7, 6, 3))

  def of_image(pool):
    return jax.grad(lambda x: jnp.sum(weights * jax.grad(lambda x: jnp.sum(pool(x) ** 3))(x)))(x)

  np.testing.assert_allclose(
      of_image(lambda x: max_pool(x, 3, 2)),
      of_image(lambda x: nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])), rtol=TOLERANCE)


def test_dense_sums_the_gradient_of_bfloat16_in_float32():
  """Fault: nine taps' products that are added up in bfloat16: four times the error."""
  x, kernel, gradient = arrays((8, 16, 16, 64), (3, 3, 64, 64), (8, 16, 16, 64))
  narrow = [array.astype(jnp.bfloat16) for array in (x, kernel, gradient)]

  def of_image(x, kernel, gradient):
    return jax.vjp(lambda x: dense.dense(x, kernel), x)[1](gradient)[0]

  exact = of_image(*[array.astype(jnp.float64) for array in narrow])
  error = jnp.abs(of_image(*narrow).astype(jnp.float64) - exact)
  assert float(jnp.max(error) / jnp.max(jnp.abs(exact))) < 0.004
