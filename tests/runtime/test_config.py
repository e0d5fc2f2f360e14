"""Bad configs are refused in one sentence that names the field, the value and what would do."""

import functools
import importlib
import importlib.util
import json
import math
import pathlib
import re

import jax
import ml_collections
import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.experiment import create_method, resolve, training_attack
from advprop_jax.method.schemes import SECOND_VIEW
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import train_step
from advprop_jax.runtime.config import (
  FIELDS,
  create_scheme,
  default_config,
  differences,
  duration,
  flatten,
  validate,
)
from advprop_jax.runtime.variants import choose, variants
from configs import imagenet_efficientnet, imagenet_resnet
from tests.conftest import ROOT

FILES = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").glob("**/*.py"))


@functools.cache
def module(path):
  return importlib.import_module(".".join(["configs", *path.with_suffix("").parts]))


VARIANTS = [(path, variant) for path in FILES for variant in variants(module(path).CHOICES)]


def load(path, variant=""):
  """A config; where it would fetch weights to know what they say of themselves, that is given."""
  config = module(path).get_config(variant)
  if config.model.pretrained:
    config.model.input_convention = "imagenet"
    config.data.image_size, config.data.crop_fraction = 224, 0.875
  return config


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_variant_of_every_config_is_valid(path, monkeypatch):
  """On as many devices as the variant says; else on one, or on 8 where it is no small one."""
  few = 1 if "small" in path.parts or path.stem == "quickstart" else 8
  for variant in variants(module(path).CHOICES):
    devices = int(choose(variant, module(path).CHOICES).get("chips", few))
    monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
    config = resolve(load(path, variant))  # validates it
    json.dumps(config.to_dict())
    assert config.data.image_size is not None


CHIPS = tuple(int(chips) for chips in imagenet_efficientnet.CHIPS)


@pytest.mark.parametrize("chips", CHIPS)
@pytest.mark.parametrize(("recipe", "names", "images", "rate"), [
    (imagenet_efficientnet, [f"b{i}" for i in range(9)], 4096, 0.256),
    (imagenet_resnet, ["50", "101", "152", "200"], 1024, 0.4)], ids=["efficientnet", "resnet"])
def test_the_updates_do_not_depend_on_the_number_of_chips(recipe, names, images, rate, chips):
  """Fails where batch or learning rate follow the chips, or a chip holds more than it can."""
  for name in names:
    config = recipe.get_config(f"{name},chips={chips}")
    assert config.data.batch_size == images
    assert math.isclose(config.optimizer.learning_rate, rate)
    at_once = images // (chips * config.train.accumulation)
    assert at_once * chips * config.train.accumulation == images
    most = recipe.AT_ONCE[name]
    kept, recomputed = (most, most) if isinstance(most, int) else most
    assert at_once <= (recomputed if config.model.remat else kept)
    # The most that fits, unless there are no more.
    assert config.train.accumulation == 1 or at_once == (
        recomputed if config.model.remat else kept)
    assert config.model.bn_group_size == (1 if chips <= 8 else max(8, chips / 8))
    assert at_once * config.model.bn_group_size >= min(images, 16)


def test_the_recipe_is_the_published_one():
  """tensorflow/tpu's flags for EfficientNets; what they have in common with its ResNets."""
  config = imagenet_efficientnet.get_config("b0")
  efficientnet = {
      "optimizer.name": "rmsprop", "optimizer.rms_decay": 0.9, "optimizer.momentum": 0.9,
      "optimizer.epsilon": 1e-3, "optimizer.schedule": "exponential", "optimizer.decay_rate": 0.97,
      "optimizer.decay_epochs": 2.4, "optimizer.weight_decay": 1e-5, "train.epochs": 350.0,
      "train.ema_decay": 0.9999, "data.augment": "autoaugment"}
  common = {"optimizer.warmup_epochs": 5.0, "optimizer.weight_decay_form": "l2",
            "optimizer.decay_batch_norm": False, "loss.label_smoothing": 0.1,
            "model.dtype": "bfloat16", "data.crop": "random_resized", "model.dropout_rate": None,
            "model.drop_path_rate": None, "data.image_size": None, "data.crop_fraction": None}
  resnet = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": True,
            "optimizer.weight_decay": 1e-4, "train.epochs": 90.0, "data.augment": "crop_flip"}
  assert (efficientnet | common).items() <= flatten(config).items()
  assert (resnet | common).items() <= flatten(imagenet_resnet.get_config("50")).items()
  strengths = [imagenet_efficientnet.get_config(f"b{i}").attack for i in range(9)]
  assert [(int(attack.epsilon), attack.num_steps) for attack in strengths] == [
      (1, 1), (1, 1), (1, 1), (2, 3)] + [(4, 5)] * 5
  assert {attack.step_size for attack in strengths} == {1.0}
  crops = [resolve(imagenet_efficientnet.get_config(f"b{i}")).data.crop_fraction for i in range(9)]
  np.testing.assert_allclose(
      crops, [0.875, 0.882, 0.890, 0.904, 0.922, 0.934, 0.943, 0.949, 0.954], atol=6e-4)


@pytest.mark.parametrize("chips", [12, 72, 100])
def test_chips_that_do_not_divide(chips):
  with pytest.raises(InputError, match=f"chips={chips}: .* give "):
    imagenet_efficientnet.recipe("b0", chips)


def test_groups_of_batch_norms():
  """TpuBatchNormalization: one replica up to 8, else eight groups, of at least 8."""
  sizes = {chips: imagenet_efficientnet.bn_group_size(chips)
           for chips in (1, 8, 16, 24, 64, 128, 512)}
  assert sizes == {1: 1, 8: 1, 16: 8, 24: 8, 64: 8, 128: 16, 512: 64}
  with pytest.raises(InputError, match="chips=12: do not divide into groups of 8"):
    imagenet_efficientnet.bn_group_size(12)


def test_networks_that_do_not_fit_compute_blocks_again():
  """Where accumulation alone would leave batch norms few images, and only there."""
  remat = {name: imagenet_efficientnet.recipe(name, 8).model.remat
           for name in imagenet_efficientnet.AT_ONCE}
  assert remat == {f"b{i}": i >= 5 for i in range(9)}
  assert not imagenet_efficientnet.recipe("b5", 512).model.remat  # 8 images for each chip


def test_variants_differ_and_the_first_is_the_default():
  for path in FILES:
    configs = [json.dumps(load(path, variant).to_dict()) for of, variant in VARIANTS if of == path]
    assert len(set(configs)) == len(configs), path
    assert json.dumps(load(path).to_dict()) == configs[0]


@pytest.mark.parametrize(("variant", "says"), [
    ("b9", "'b9'"), ("size=b0,b1", "'b1'"), ("b0,epsilon=5", "'epsilon=5'"), ("b0,=1", "'=1'")])
def test_a_variant_that_is_not_there(variant, says):
  with pytest.raises(InputError) as error:
    choose(variant, {"size": ("b0", "b1"), "epsilon": ("1", "2")})
  assert says in str(error.value)
  assert "size=b0|b1; epsilon=1|2" in str(error.value)


def test_a_variant_by_names_or_values_in_any_order():
  choices = {"size": ("b0", "b1"), "epsilon": ("1", "2")}
  assert choose("2,size=b1", choices) == {"size": "b1", "epsilon": "2"}
  assert choose("", choices) == {"size": "b0", "epsilon": "1"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_config_says_how_to_run_it(path):
  text = module(path).__doc__
  assert f"python -m advprop_jax.main --config=configs/{path}" in text
  assert "Hardware:" in text
  assert "not run" in text or "README" in text


@pytest.mark.parametrize(("path", "variant"), [
    ("imagenet_efficientnet.py", "b0"), ("small/schemes.py", "fine_grained,resnet_tiny"),
    pytest.param("quickstart.py", "advprop", marks=pytest.mark.slow),
    pytest.param("quickstart.py", "vanilla", marks=pytest.mark.slow),
    pytest.param("small/schemes.py", "fast_advprop", marks=pytest.mark.slow)])
def test_a_step_of_the_config_can_be_traced(path, variant):
  """Network, attack, losses, optimizer and moving averages fit together; nothing is computed."""
  config = resolve(load(pathlib.Path(path), variant))
  method = create_method(config, create_scheme(config), 10, lambda step: 0.1,
                         training_attack(config, 100.0))
  size = config.data.image_size
  state = jax.eval_shape(lambda: create_train_state(method.model, method.optimizer, 0, size, True))
  images = 10 * config.train.accumulation
  labels = jax.ShapeDtypeStruct((1, images), np.int32)
  images = jax.ShapeDtypeStruct((1, images, size, size, 3), np.uint8)
  batch = {"image": images, SECOND_VIEW: images, "label": labels}
  step = jax.pmap(lambda s, b: train_step(method, s, b), axis_name=method.axis_name,
                  in_axes=(None, 0), out_axes=None)
  new_state, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
      lambda x: (x.shape, x.dtype), state)
  assert "loss" in metrics


BAD = {
    "scheme": ("advpropp", "advprop"),
    "seed": (-1, "at least 0"),
    "model.name": ("efficientnet_b9", "efficientnet_b"),
    "model.dtype": ("float16", "bfloat16"),
    "model.dropout_rate": (1.0, "below 1"),
    "attack.name": ("pdg", "pgd"),
    "attack.epsilon": (-1.0, "at least 0"),
    "attack.step_size": (-0.5, "at least 0"),
    "attack.num_steps": (-1, "at least 0"),
    "attack.statistics": ("runing", "running"),
    "attack.clean_start": (1.5, "at most 1"),
    "attack.target": ("least", "random"),
    "data.image_size": (3, "at least"),
    "data.batch_size": (0, "at least 1"),
    "data.augment": ("autoaugment_v9", "crop_flip"),
    "data.crop": ("random_resize", "random_resized"),
    "loss.label_smoothing": (1.1, "at most 1"),
    "loss.weights.clean": (-1.0, "at least 0"),
    "optimizer.name": ("rmsprob", "rmsprop"),
    "optimizer.schedule": ("linear", "cosine"),
    "train.epochs": (-1.0, "at least 0"),
    "train.steps": (-5, "at least 0"),
    "train.accumulation": (0, "at least 1"),
    "checkpoint.keep": (0, "at least 1"),
}


def config_with(path, value):
  config = default_config().to_dict()
  *sections, name = path.split(".")
  section = config
  for key in sections:
    section = section[key]
  section[name] = value
  return ml_collections.ConfigDict(config, type_safe=False)


def refused(config, devices=1):
  with pytest.raises(InputError) as error:
    validate(config, devices)
  sentence = str(error.value)
  assert "\n" not in sentence
  return sentence


@pytest.mark.parametrize("path", BAD)
def test_a_value_that_cannot_work(path):
  value, would_do = BAD[path]
  sentence = refused(config_with(path, value))
  assert f"config.{path}={value!r}" in sentence.replace(f"={value}", f"={value!r}")
  assert would_do in sentence


@pytest.mark.parametrize(("path", "value", "kind"), [
    ("scheme", 3, "str"), ("data.batch_size", 12.5, "int"), ("attack.epsilon", "four", "float"),
    ("optimizer.nesterov", "yes", "bool"), ("seed", True, "int"), ("train.steps", 1.5, "int"),
    ("optimizer.learning_rate", None, "float")])
def test_a_value_of_the_wrong_type(path, value, kind):
  sentence = refused(config_with(path, value))
  assert f"config.{path}={value!r}" in sentence
  assert f"give a {kind}" in sentence


def test_whole_numbers_are_floats_too():
  validate(config_with("attack.epsilon", 2))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("path", [path for path, field in FIELDS.items() if field.type is float])
def test_a_number_that_is_not_finite(path, value):
  """Fails where a float field takes inf or nan, which no range check need notice."""
  assert f"config.{path}={value!r}" in refused(config_with(path, value))


def test_an_unknown_field():
  sentence = refused(config_with("attack.epsilom", 1.0))
  assert "config.attack.epsilom" in sentence
  assert "config.attack.epsilon" in sentence.split(";")[1]


def test_a_missing_field():
  config = default_config().unlock()
  del config.attack.epsilon
  assert "config.attack.epsilon: missing" in refused(config)


@pytest.mark.parametrize(("path", "accumulation"), [
    ("data.batch_size", 1), ("data.batch_size", 2), ("eval.batch_size", 1)])
def test_a_batch_that_the_devices_do_not_divide(path, accumulation):
  config = config_with(path, 100)
  config.train.accumulation = accumulation
  if path == "eval.batch_size":
    config.data.batch_size = 128
  sentence = refused(config, devices=8)
  below, above = (int(n) for n in re.search(r"(\d+) or (\d+) would do", sentence).groups())
  pieces = 8 * accumulation if path == "data.batch_size" else 8
  assert below % pieces == above % pieces == 0
  assert below < 100 < above
  config = config_with(path, above)
  config.train.accumulation = accumulation
  validate(config, devices=8)


def test_groups_that_do_not_divide_the_devices():
  sentence = refused(config_with("model.bn_group_size", 3), devices=4)
  assert "1, 2, 4 would do" in sentence


def test_adamw_has_a_decay_of_its_own():
  assert "decoupled" in refused(config_with("optimizer.name", "adamw"))


def test_every_field_says_what_it_is():
  for path, field in FIELDS.items():
    assert field.meaning, path
    assert field.default is None or field.check(field.default) is None, path


def test_differences_name_the_fields():
  config, saved = default_config(), default_config()
  config.attack.epsilon, config.eval.batch_size = 2.0, 32
  assert differences(config.to_dict(), saved.to_dict()) == [
      "attack.epsilon: 4.0 -> 2.0", "eval.batch_size: 256 -> 32"]
  assert differences(config.to_dict(), saved.to_dict(), ["eval"]) == ["attack.epsilon: 4.0 -> 2.0"]
  assert flatten(saved)["attack.epsilon"] == 4.0


def test_durations_in_steps_or_epochs():
  config = default_config()
  config.train.epochs = 2.5
  assert duration(config.train, "", 10.0) == 25
  config.train.steps = 7
  assert duration(config.train, "", 10.0) == 7
  assert duration(config.optimizer, "decay", 10.0) == 24


def test_a_field_that_came_later_had_its_default():
  """Fails where a run from before a field was there counts as one of another config."""
  config = default_config()
  saved = config.to_dict()
  del saved["data"]["crop"], saved["model"]["input_convention"]
  config.model.input_convention = "inception"
  assert not differences(config.to_dict(), saved)
  config.data.crop = "random_resized"
  assert differences(config.to_dict(), saved) == ["data.crop: 'pad' -> 'random_resized'"]
