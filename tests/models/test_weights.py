"""Published weights: golden logits of the published networks, and the way there and back."""

import functools
import importlib.util
import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from advprop_jax import trained
from advprop_jax.errors import InputError
from advprop_jax.export import write_timm
from advprop_jax.models import NAMES, create_model
from advprop_jax.models.batch_norm import BatchNorm
from advprop_jax.models.weights import from_state_dict, looks_like, to_timm

GOLDEN = [
    "tf_efficientnet_lite0",
    "tf_efficientnet_b0",
    pytest.param("tf_efficientnet_b1", marks=pytest.mark.slow),
    pytest.param("tf_efficientnet_b4", marks=pytest.mark.slow),
    pytest.param("tf_efficientnet_b8", marks=pytest.mark.slow),
    "resnet50",
    pytest.param("resnet152", marks=pytest.mark.slow),
]


def load_golden(shared, name):
  """(the module that makes weights and images, the reference's numbers)."""
  folder = shared / "golden"
  if not (folder / f"{name}.npz").exists():
    pytest.skip(f"needs {name}.npz in the folder of references beside the checkout")
  spec = importlib.util.spec_from_file_location("golden_weights", folder / "golden_weights.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module, dict(np.load(folder / f"{name}.npz"))


def sample_sizes(model, images):
  """{a batch norm's path: over how many positions it averages}: what makes a variance unbiased."""
  sizes = {}

  def record(function, args, kwargs, context):
    if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
      sizes[context.module.path] = math.prod(args[0].shape[:-1])
    return function(*args, **kwargs)

  with nn.intercept_methods(record):
    jax.eval_shape(model.init, jax.random.key(0), images)
  return sizes


def batch_statistics(model, new, images):
  """The batch's own mean and unbiased variance, from running statistics that started at zero."""
  sizes, share = sample_sizes(model, images), 1 - model.architecture.norm_momentum
  flat = {}
  for path, leaf in traverse_util.flatten_dict(new["batch_stats"]).items():
    n = sizes[path[:-1]]
    flat["batch_stats", *path] = leaf / share * (n / (n - 1) if path[-1] == "var" else 1)
  return traverse_util.unflatten_dict(flat)


def assert_agree(logits, reference):
  error = np.abs(np.asarray(logits, np.float64) - reference).max() / np.abs(reference).max()
  assert error < 1e-3


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(name, shared):
  """Faults: another padding or epsilon, squeeze-excite of the expanded channels, stride in the
  first convolution of a bottleneck, ..."""
  golden, reference = load_golden(shared, name)
  weights = golden.weights(json.loads(str(reference["shapes"])))
  model = create_model(name, dropout_rate=0.0, drop_path_rate=0.0)
  images = jnp.asarray(golden.image(int(reference["size"]), 4))
  variables = from_state_dict(name, weights)
  start = jax.tree.map(np.zeros_like, variables["batch_stats"])

  @jax.jit
  def train(params, batch_stats):
    return model.apply({"params": params, "batch_stats": batch_stats}, images, train=True,
                       mutable=["batch_stats"])

  logits, new = train(variables["params"], start)
  assert_agree(logits, reference["train_logits"])

  statistics = {key.removeprefix("stats/"): value for key, value in reference.items()
                if key.startswith("stats/")}
  ours = to_timm(name, {**variables, **batch_statistics(model, new, images)})
  for key, value in statistics.items():
    np.testing.assert_allclose(ours[key], value, rtol=1e-3, atol=1e-3 * np.abs(value).max())

  evaluated = jax.jit(model.apply)(from_state_dict(name, {**weights, **statistics}), images)
  assert_agree(evaluated, reference["eval_logits"])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_through_files(name, shared, tmp_path):
  """A published file in, timm's format out: no bit is lost, and no name or shape is another."""
  golden, reference = load_golden(shared, name)
  weights = golden.weights(json.loads(str(reference["shapes"])))
  safetensors.numpy.save_file(weights, tmp_path / "in.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
  network = trained.read(str(tmp_path / "in.safetensors"), name)
  write_timm(network, tmp_path)
  back = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert sorted(back) == sorted(weights)
  for key, value in weights.items():
    np.testing.assert_array_equal(back[key], value, strict=True)
  assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name


def test_names_and_shapes_are_those_of_the_reference(shared):
  for name in ("tf_efficientnet_b0", "tf_efficientnet_b8", "tf_efficientnet_lite0", "resnet50",
               "resnet152"):
    _, reference = load_golden(shared, name)
    expected = {key: tuple(shape) for key, shape in json.loads(str(reference["shapes"])).items()
                if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in random_state_dict(name).items()} == expected


@functools.cache
def variable_shapes(name, **settings):
  model = create_model(name, **settings)
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def random_state_dict(name, **settings):
  """A state dict of this project's writing, from random variables."""
  rng = np.random.default_rng(0)
  return to_timm(name, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32),
                                    variable_shapes(name, **settings)))


LARGE = ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_b8", "resnet200")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NAMES])
def test_there_and_back_is_exact(name):
  weights = random_state_dict(name)
  back = to_timm(name, from_state_dict(name, weights))
  assert list(back) == list(weights)
  for key, value in weights.items():
    np.testing.assert_array_equal(back[key], value, strict=True)


@pytest.mark.parametrize(("name", "classifier"), [("efficientnet_tiny", "classifier"),
                                                  ("resnet_tiny", "fc")])
def test_number_of_classes_is_the_classifiers(name, classifier):
  weights = random_state_dict(name, num_classes=7)
  kernel = from_state_dict(name, weights)["params"]["classifier"]["kernel"]
  np.testing.assert_array_equal(kernel, weights[f"{classifier}.weight"].T)
  assert kernel.shape[1] == 7


@pytest.mark.parametrize("name", ["efficientnet_tiny", "resnet_tiny"])
def test_only_the_main_domain_is_written(name):
  two = random_state_dict(name, domains=("clean", "adversarial"))
  assert {key: value.shape for key, value in two.items()} == {
      key: value.shape for key, value in random_state_dict(name).items()}


def test_number_of_batches_is_ignored():
  weights = random_state_dict("efficientnet_tiny")
  more = {**weights, "bn1.num_batches_tracked": np.array(3)}
  jax.tree.map(np.testing.assert_array_equal, from_state_dict("efficientnet_tiny", more),
               from_state_dict("efficientnet_tiny", weights))


@pytest.mark.parametrize(("change", "message"), [
    ({"bn1.weight": None}, "1 tensors do not fit efficientnet_tiny: bn1.weight is missing, it "
                           "should be (16,)"),
    ({"bn1.weight": np.ones(3)}, "bn1.weight is (3,), it should be (16,)"),
    ({"fc.weight": np.ones((2, 3))}, "fc.weight, (2, 3), is not of this network"),
])
def test_tensors_that_do_not_fit_are_named_with_both_shapes(change, message):
  weights = {**random_state_dict("efficientnet_tiny"), **change}
  weights = {key: value for key, value in weights.items() if value is not None}
  with pytest.raises(InputError, match=re.escape(message)):
    from_state_dict("efficientnet_tiny", weights)


def test_ten_differences_are_listed_at_most():
  with pytest.raises(InputError) as raised:
    from_state_dict("efficientnet_tiny", random_state_dict("efficientnet_b0"))
  hint, *listed, more = str(raised.value).split("; ")
  assert len(listed) == 10
  assert re.fullmatch(r"and \d+ more", more)
  assert hint == "they look like those of efficientnet_b0: give that as config.model.name"


def test_variables_of_another_network_are_refused():
  variables = from_state_dict("efficientnet_tiny", random_state_dict("efficientnet_tiny"))
  with pytest.raises(InputError, match=r"do not fit efficientnet_b0.*is missing"):
    to_timm("efficientnet_b0", variables)


def test_networks_are_told_by_their_tensors():
  """Whatever the classes, and with a few tensors missing; fails where all look like one."""
  for name in ("efficientnet_b1", "efficientnet_lite2", "resnet101"):
    weights = random_state_dict(name, num_classes=3)
    assert looks_like(dict(list(weights.items())[5:])) == name
  assert looks_like({"a": np.zeros(3)}) is None
