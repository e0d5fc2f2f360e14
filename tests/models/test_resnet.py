"""ResNet: the published sizes, the arithmetic by hand, and what the bank makes of it."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from advprop_jax import models
from advprop_jax.models import create_model, network, resnet
from advprop_jax.models.batch_norm import BatchNorm, drop_auxiliary
from advprop_jax.models.dense import FEW, dense
from advprop_jax.models.resnet import Architecture, ResNet

# Trainable parameters with 1000 classes, measured on timm 1.0.31 (the published ones; the tiny
# network, with 10 classes, is this project's own).
PARAMETERS = {
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet200": 64_673_832,
    "resnet_tiny": 175_258,
}
DOMAINS = ("clean", "adversarial")
BOTH = ["batch_stats", "batch_stats_adversarial"]
BOTTLENECK = Architecture(image_size=32, repeats=(1, 2), stem=4)
BASIC = Architecture(image_size=32, repeats=(1, 2), stem=4, bottleneck=False, small_images=True)


def shapes_of(name, **settings):
  model = create_model(name, **{"num_classes": 10 if name.endswith("tiny") else 1000, **settings})
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def make_images(n=4, side=17, seed=0):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, side, side, 3)), jnp.float32)


def create(architecture=BOTTLENECK, **settings):
  """A small model and variables away from the start, where residual branches are silent."""
  model = ResNet(architecture, **{"num_classes": 10, "domains": DOMAINS, **settings})
  variables = jax.jit(model.init)(jax.random.key(0), make_images())
  rng = np.random.default_rng(1)
  return model, jax.tree.map(
      lambda x: x + jnp.asarray(rng.uniform(0.1, 0.5, x.shape), x.dtype), variables)


@pytest.fixture(scope="module")
def small():
  return create()


# What is published


@pytest.mark.parametrize("name", resnet.ARCHITECTURES)
def test_number_of_parameters(name):
  assert count(shapes_of(name)["params"]) == PARAMETERS[name]


def test_parameters_of_one_auxiliary_bank():
  """As many as ResNet-50 has scales and biases: two for each of the 26,560 outputs of its norms."""
  more = count(shapes_of("resnet50", domains=DOMAINS)["params"]) - PARAMETERS["resnet50"]
  assert more == 2 * 26_560
  shared = shapes_of("resnet50", domains=DOMAINS, share_affine=True)
  assert count(shared["params"]) == PARAMETERS["resnet50"]


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet50", {"stem_norm": 112, "stage_1_block_1/norm_1": 56, "stage_2_block_1/norm_1": 56,
                  "stage_2_block_1/norm_2": 28, "stage_2_block_1/shortcut_norm": 28,
                  "stage_4_block_3/norm_3": 7}),
    ("resnet_tiny", {"stem_norm": 32, "stage_1_block_2/norm_2": 32, "stage_2_block_1/norm_1": 16,
                     "stage_3_block_2/norm_2": 8}),
])
def test_sides_of_feature_maps(name, expected):
  """Fault: ResNet version 1, which has the stride in the first convolution of a bottleneck."""
  sides, model, side = {}, create_model(name), models.image_size(name)

  def record(function, args, kwargs, context):
    if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
      sides["/".join(context.module.path)] = args[0].shape[1]
    return function(*args, **kwargs)

  with nn.intercept_methods(record):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
  assert expected.items() <= sides.items()
  assert side // models.min_image_size(name) == list(sides.values())[-1]


# The arithmetic


def convolve_by_hand(x, kernel, stride):
  """As PyTorch: (size - 1) / 2 zeros on each side."""
  size = len(kernel)
  x = np.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0)))
  rows, columns = (length - size + 1 for length in x.shape[1:3])
  return sum(x[:, i:i + rows:stride, j:j + columns:stride] @ kernel[i, j]
             for i, j in np.ndindex(size, size))


def max_pool_by_hand(x):
  rows, columns = x.shape[1:3]
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  return np.max([x[:, i:i + rows:2, j:j + columns:2] for i, j in np.ndindex(3, 3)], 0)


def logits_by_hand(net, variables, x):
  """In float64, by running statistics."""
  params, statistics = (
      {"/".join(path): np.asarray(leaf, np.float64)
       for path, leaf in traverse_util.flatten_dict(variables[name]).items()}
      for name in ("params", "batch_stats"))

  def layer(x, conv, norm, stride=1):
    x = convolve_by_hand(x, params[f"{conv}/kernel"], stride) - statistics[f"{norm}/mean"]
    return (x / np.sqrt(statistics[f"{norm}/var"] + 1e-5) * params[f"{norm}/scale"]
            + params[f"{norm}/bias"])

  def block(x, name, stride):
    y = x
    strides = (1, stride, 1) if net.bottleneck else (stride, 1)
    for i, layer_stride in enumerate(strides, 1):
      y = layer(np.maximum(y, 0) if i > 1 else y, f"{name}/conv_{i}", f"{name}/norm_{i}",
                layer_stride)
    if f"{name}/shortcut/kernel" in params:
      x = layer(x, f"{name}/shortcut", f"{name}/shortcut_norm", stride)
    return np.maximum(x + y, 0)

  x = np.maximum(layer(x, "stem", "stem_norm", 1 if net.small_images else 2), 0)
  x = x if net.small_images else max_pool_by_hand(x)
  for name, stride in (("stage_1_block_1", 1), ("stage_2_block_1", 2), ("stage_2_block_2", 1)):
    x = block(x, name, stride)
  return x.mean((1, 2)) @ params["classifier/kernel"] + params["classifier/bias"]


@pytest.mark.parametrize("net", [BOTTLENECK, BASIC], ids=["bottleneck", "basic"])
@pytest.mark.parametrize("side", [16, 17])
def test_logits_are_those_of_the_formula(net, side):
  """Faults: 'SAME' padding, which differs for even sides; a norm or a ReLU in another place."""
  model, variables = create(net)
  images = make_images(2, side)
  expected = logits_by_hand(net, variables, np.asarray(images, np.float64))
  np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, rtol=1e-4)


# Its convolution

# Even and odd sides, a side below the kernel's, and padding that a stride leaves unused.
CONVOLUTIONS = [((3, 8, 7), 3, 1), ((2, 8, 7), 3, 2), ((2, 16, 17), 7, 2), ((2, 4, 9), 5, 2),
                ((2, 1, 3), 3, 2), ((2, 10, 9), 3, 3)]


def make_convolution(shape, size, channels):
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=(*shape, channels)), jnp.float32),
          jnp.asarray(rng.normal(size=(size, size, channels, 5)), jnp.float32))


def by_xla(x, kernel, stride, symmetric):
  padding = [(len(kernel) // 2,) * 2] * 2 if symmetric else "SAME"
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("channels", [FEW - 1, FEW + 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "size", "stride"), CONVOLUTIONS)
def test_gradients_of_a_convolution_are_xlas(shape, size, stride, symmetric, channels):
  x, kernel = make_convolution(shape, size, channels)
  y, backward = jax.vjp(lambda *inputs: dense(*inputs, stride, symmetric), x, kernel)
  expected, backward_xla = jax.vjp(lambda *inputs: by_xla(*inputs, stride, symmetric), x, kernel)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  gradient = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
  for ours, theirs in zip(backward(gradient), backward_xla(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [FEW - 1, FEW + 1])
def test_second_derivatives_of_a_convolution_agree(channels):
  x, kernel = make_convolution((2, 6, 6), 3, channels)

  def penalty(convolve, kernel):  # of the input gradient, as gradient regularisation has it
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(convolve(x, kernel, 2, True))))(x)
    return jnp.sum(jnp.square(gradient))

  ours, theirs = (jax.grad(functools.partial(penalty, convolve))(kernel)
                  for convolve in (dense, by_xla))
  np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_gradients_are_products_on_the_cpu():
  """Fault: JAX's own gradients, for which XLA's routine has to turn the kernel round."""
  x, kernel = make_convolution((2, 8, 8), 3, FEW + 1)
  gradient = jax.jit(jax.grad(lambda x, kernel: jnp.sum(dense(x, kernel)), (0, 1)))

  def operations(platform):
    text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    return [text.count(name) for name in ("stablehlo.dot_general", "stablehlo.convolution")]

  # Nine taps and three rows of the kernel.
  assert operations("cpu") == [12, 0]
  assert operations("tpu") == operations("cuda") == [0, 2]


# How it starts


@pytest.mark.parametrize(("net", "last"), [(BOTTLENECK, "norm_3"), (BASIC, "norm_2")])
def test_residual_branches_start_silent_in_every_domain(net, last):
  """Fault: zero scales of the main domain alone, of every norm, or of a bottleneck's second."""
  def zeros(net):
    model = ResNet(net, domains=DOMAINS)
    params = jax.jit(model.init)(jax.random.key(0), make_images())["params"]
    scales = {path: leaf for path, leaf in traverse_util.flatten_dict(params).items()
              if path[-1].startswith("scale")}
    assert all(np.all(leaf == leaf[0]) and leaf[0] in (0, 1) for leaf in scales.values())
    return {path for path, leaf in scales.items() if leaf[0] == 0}

  assert zeros(net) == {(block, last, scale) for block, _, _ in resnet.block_names(net)
                        for scale in ("scale", "scale_adversarial")}
  assert not zeros(dataclasses.replace(net, zero_init_residual=False))


def test_published_networks_start_with_silent_branches():
  assert all(net.zero_init_residual for net in resnet.ARCHITECTURES.values())


def test_classifier_starts_normal_and_without_bias():
  model = ResNet(dataclasses.replace(BASIC, repeats=(1,)), num_classes=1000)
  params = jax.jit(model.init)(jax.random.key(0), make_images())["params"]["classifier"]
  assert float(params["kernel"].std()) == pytest.approx(0.01, rel=0.05)
  assert not params["bias"].any()


# Dropout and stochastic depth


@pytest.mark.parametrize(("settings", "rate"), [({}, 0.0), ({"drop_path_rate": 0.2}, 0.2)])
def test_stochastic_depth_grows_linearly_where_asked(monkeypatch, settings, rate):
  """Huang et al., equation 4: block l of L has rate * l / L."""
  rates = []

  class Spy(network.Dropout):
    def __call__(self, x, domains):
      rates.append((self.path[0], self.rate, self.whole_image))
      return x

  monkeypatch.setattr(network, "Dropout", Spy)
  model = create_model("resnet50", dropout_rate=0.3, **settings)
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  names = [name for name, _, _ in resnet.block_names(model.architecture)]
  assert len(names) == 16
  assert {name: value for name, value, whole in rates if whole} == pytest.approx(
      {name: rate * i / 16 for i, name in enumerate(names, 1)})
  assert [value for _, value, whole in rates if not whole] == [0.3]


def test_a_dropped_block_is_its_shortcut():
  """Faults: dropping the sum, which loses the image; dropping before the last norm's bias."""
  net = dataclasses.replace(BOTTLENECK, repeats=(1,))
  model, variables = create(net, drop_path_rate=1 - 1e-6)
  silent = traverse_util.flatten_dict(variables)
  for leaf in ("scale", "bias"):
    path = ("params", "stage_1_block_1", "norm_3", leaf)
    silent[path] = jnp.zeros_like(silent[path])
  dropped = model.apply(variables, make_images(), rngs={"dropout": jax.random.key(0)})
  np.testing.assert_array_equal(
      dropped, model.apply(traverse_util.unflatten_dict(silent), make_images()))
  assert np.any(dropped != model.apply(variables, make_images()))


@pytest.mark.parametrize("rates", [{"dropout_rate": 0.5}, {"drop_path_rate": 0.5}])
def test_dropout_needs_a_rate_and_a_key(small, rates):
  model, variables = small
  key = {"dropout": jax.random.key(1)}
  still = model.apply(variables, make_images())
  np.testing.assert_array_equal(model.apply(variables, make_images(), rngs=key), still)
  dropping = ResNet(BOTTLENECK, 10, DOMAINS, **rates)
  np.testing.assert_array_equal(dropping.apply(variables, make_images()), still)
  assert np.any(dropping.apply(variables, make_images(), rngs=key) != still)


# The bank


def test_the_main_domain_is_the_first(small):
  model, variables = small
  clean, adversarial = (model.apply(variables, make_images(), domains=(domain,))
                        for domain in DOMAINS)
  np.testing.assert_array_equal(model.apply(variables, make_images()), clean)
  assert np.any(clean != adversarial)


def test_one_pass_of_two_domains_is_two_passes(small):
  """Logits and new statistics. Fault: a layer that mixes the domains of a batch."""
  model, variables = small
  apply = jax.jit(lambda images, domains: model.apply(
      variables, images, domains=domains, train=True, mutable=BOTH), static_argnums=1)
  clean, adversarial = make_images(), make_images(seed=2) * 0.5 + 0.3
  logits, new = apply(jnp.concatenate([clean, adversarial]), DOMAINS)
  first, first_new = apply(clean, ("clean",))
  second, second_new = apply(adversarial, ("adversarial",))
  np.testing.assert_allclose(logits, jnp.concatenate([first, second]), rtol=1e-4, atol=1e-4)
  expected = {BOTH[0]: first_new[BOTH[0]], BOTH[1]: second_new[BOTH[1]]}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, expected)


def test_without_auxiliary_batch_norms_the_logits_are_bit_identical(small):
  model, variables = small
  deployed, main = ResNet(BOTTLENECK, 10), drop_auxiliary(variables)
  shapes = jax.eval_shape(deployed.init, jax.random.key(0), make_images())
  assert jax.tree.structure(main) == jax.tree.structure(shapes)
  np.testing.assert_array_equal(jax.jit(model.apply)(variables, make_images()),
                                jax.jit(deployed.apply)(main, make_images()))


@pytest.mark.parametrize("shared", ["share_statistics", "share_affine"])
def test_sharing_reaches_every_norm(shared):
  model = ResNet(BASIC, domains=DOMAINS, **{shared: True})
  variables = jax.eval_shape(model.init, jax.random.key(0), make_images())
  leaves = {path[-1] for path in traverse_util.flatten_dict(variables["params"])}
  assert (set(variables) == {"params", "batch_stats"}) == (shared == "share_statistics")
  assert ({"scale_adversarial", "bias_adversarial"} <= leaves) == (shared != "share_affine")


def test_bfloat16_computes_in_it_and_keeps_float32(small):
  _, variables = small
  model = ResNet(BOTTLENECK, 10, DOMAINS, dtype=jnp.bfloat16)
  new = jax.eval_shape(model.init, jax.random.key(0), make_images())
  assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
  dtypes = {}

  def record(function, args, kwargs, context):
    y = function(*args, **kwargs)
    if context.method_name == "__call__":
      dtypes["/".join(context.module.path)] = y.dtype
    return y

  with nn.intercept_methods(record):
    logits = model.apply(variables, make_images())
  assert {path for path, dtype in dtypes.items() if dtype != jnp.bfloat16} == {
      "", "classifier", "Dropout_0"}
  assert "stage_2_block_2/conv_2" in dtypes
  full = small[0].apply(variables, make_images())
  assert logits.dtype == full.dtype == jnp.float32
  assert 0 < float(jnp.abs(logits - full).max()) < 0.05 * float(jnp.abs(full).max())
