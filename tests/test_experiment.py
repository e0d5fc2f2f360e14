"""Every field of a config arrives where it is said to."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advprop_jax.benchmarks.adversarial import AUXILIARY, MAIN
from advprop_jax.benchmarks.clean import CLEAN
from advprop_jax.benchmarks.contract import test_pass as whole_pass
from advprop_jax.evaluate import open_benchmarks, subject_of
from advprop_jax.experiment import create_experiment, fresh_state
from advprop_jax.measure import Measurer
from advprop_jax.method.attack import Attack
from advprop_jax.method.optimizer import SCHEDULES, create_optimizer
from advprop_jax.models import efficientnet
from advprop_jax.runtime.config import FIELDS, default_config
from tests import one_block

STEPS_PER_EPOCH = 5


def eval_batches(experiment):
  """The batches of clean test images."""
  measurer = Measurer(experiment.method.model, experiment.config)
  return measurer.batches(whole_pass(subject_of(experiment)))


def benchmarks(experiment):
  """{name: benchmark} of those that can be measured."""
  return open_benchmarks(subject_of(experiment))[0]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
  """Nothing is computed on the devices here; 4 of them, so that there can be groups."""
  one_block.register()
  monkeypatch.setattr(jax, "device_count", lambda: 4)


def make_experiment(changes=None, **more):
  config = default_config()
  settings = {"model.name": "one_block", "data.train_split": "train[:100]",
              "data.test_split": "test[:12]", "data.batch_size": 20, "eval.batch_size": 12,
              **(changes or {}), **more}
  for path, value in settings.items():
    *sections, name = path.split(".")
    section = config
    for key in sections:
      section = section[key]
    section[name] = value
  return create_experiment(config)


def weights(experiment):
  return {part.name: part.weight for part in experiment.method.scheme.parts}


def smoothing(experiment):
  return experiment.method.label_smoothing, experiment.method.attack.label_smoothing


def model(name):
  return lambda experiment: getattr(experiment.method.model, name)


def attack(name):
  return lambda experiment: getattr(experiment.method.attack, name)


def eval_attack(name):
  return lambda experiment: getattr(experiment.eval_attack, name)


def eval_start(experiment):
  return experiment.eval_attack.name, experiment.eval_attack.clean_start


FINE_GRAINED = {"scheme": "fine_grained", "data.second_augment": "randaugment"}
FAST = {"scheme": "fast_advprop", "attack.num_steps": 1, "attack.statistics": "batch",
        "attack.dropout": True, "train.epochs": 12.0}

# field: (value, where it lands, what is there then, other settings that it needs)
LANDS = {
    "scheme": ("joint", lambda e: e.method.scheme.domains, ("clean",), {}),
    "model.name": ("efficientnet_b3", model("architecture"),
                   efficientnet.ARCHITECTURES["efficientnet_b3"], {}),
    "model.dtype": ("bfloat16", model("dtype"), jnp.dtype("bfloat16"), {}),
    "model.dropout_rate": (0.37, model("dropout_rate"), 0.37, {}),
    "model.drop_path_rate": (0.41, model("drop_path_rate"), 0.41, {}),
    "model.input_convention": ("lite", model("input_convention"), "lite", {}),
    "model.share_statistics": (True, model("share_statistics"), True, {}),
    "model.share_affine": (True, model("share_affine"), True, {}),
    "model.bn_group_size": (2, model("group_size"), 2, {}),
    "model.remat": (True, model("remat"), True, {}),
    "attack.name": ("ifgsm", lambda e: (e.method.attack.name, e.method.attack.clean_start),
                    ("ifgsm", 1.0), {}),
    "attack.norm": ("l2", attack("norm"), "l2", {}),
    "attack.epsilon": (7.0, attack("epsilon"), 7.0, {}),
    "attack.step_size": (2.5, attack("step_size"), 2.5, {}),
    "attack.num_steps": (3, attack("num_steps"), 3, {}),
    "attack.clean_start": (0.25, attack("clean_start"), 0.25, {}),
    "attack.statistics": ("batch", attack("statistics"), "batch", {}),
    "attack.target": ("random", attack("target"), "random", {}),
    "attack.dropout": (True, attack("dropout"), True, {}),
    "attack.label_smoothing": (0.3, smoothing, (0.1, 0.3), {}),
    "attack.ramp_epochs": (4.0, attack("ramp_steps"), 20, {}),
    "attack.ramp_steps": (13, attack("ramp_steps"), 13, {"attack.ramp_epochs": 2.0}),
    "attack.one_in": (4, lambda e: (e.method.scheme.pieces, e.total_steps), (4, 48),
                      {**FAST, "data.batch_size": 80, "data.train_split": "train[:400]"}),
    "loss.label_smoothing": (0.2, smoothing, (0.2, 0.2), {}),
    "loss.weights.clean": (0.7, weights, {"clean": 0.7, "adversarial": 1.0}, {}),
    "loss.weights.adversarial": (0.6, weights, {"clean": 1.0, "adversarial": 0.6}, {}),
    "loss.weights.autoaugment": (0.5, weights, {"clean": 1.0, "autoaugment": 0.5,
                                                "adversarial": 1.0, "adversarial_second": 0.0},
                                 FINE_GRAINED),
    "loss.weights.adversarial_second": (0.4, weights, {
        "clean": 1.0, "autoaugment": 1.0, "adversarial": 1.0, "adversarial_second": 0.4},
        FINE_GRAINED),
    "loss.weights.adversarial_start": (
        0.3, lambda e: e.method.scheme.weights,
        {"clean": 1.0, "adversarial": 0.5, "adversarial_start": 0.3}, FAST),
    "data.crop_fraction": (0.5, lambda e: e.evaluation_transform.keywords["crop_fraction"], 0.5,
                           {}),
    "optimizer.trainable": ("norms_and_classifier", lambda e: e.method.trainable,
                            "norms_and_classifier", {}),
    "train.epochs": (3.0, lambda e: e.total_steps, 15, {}),
    "train.steps": (11, lambda e: e.total_steps, 11, {}),
    "train.accumulation": (5, lambda e: e.method.accumulation, 5, {}),
    "train.ema_decay": (0.995, lambda e: e.method.ema_decay, 0.995, {}),
    "eval.batch_size": (24, lambda e: eval_batches(e).blocks._batch_size, 24, {}),
    "eval.num_workers": (3, lambda e: eval_batches(e).num_workers, 3, {}),
    "eval.benchmarks": ("strength,clean", lambda e: list(benchmarks(e)), ["clean", "strength"], {}),
    "eval.restarts": (3, lambda e: benchmarks(e)["adversarial"].passes[MAIN].restarts, 3, {}),
    "eval.strengths": ("1,3", lambda e: [
        one.attack.epsilon for one in benchmarks(e)["strength"].passes.values()], [1.0, 3.0],
                       {"eval.benchmarks": "strength"}),
    "eval.apgd_steps": (7, lambda e: [
        one.attack.num_steps for one in benchmarks(e)["apgd"].passes.values()], [7],
                        {"eval.benchmarks": "apgd"}),
    "eval.every_epochs": (3.0, lambda e: e.every("eval"), 15, {}),
    "eval.every_steps": (9, lambda e: e.every("eval"), 9, {}),
    "eval.attack": ("ifgsm", eval_start, ("ifgsm", 1.0), {}),
    "eval.epsilon": (6.0, eval_attack("epsilon"), 6.0, {}),
    "eval.step_size": (1.5, eval_attack("step_size"), 1.5, {}),
    "eval.num_steps": (20, eval_attack("num_steps"), 20, {}),
    "checkpoint.every_epochs": (3.0, lambda e: e.every("checkpoint"), 15, {}),
    "checkpoint.every_steps": (9, lambda e: e.every("checkpoint"), 9, {}),
}


@pytest.mark.parametrize("path", LANDS)
def test_where_a_field_lands(path):
  """Fails where the field is dropped, or its value taken from another field."""
  value, read, expected, needed = LANDS[path]
  assert value != FIELDS[path].default
  assert read(make_experiment(needed)) != expected
  assert read(make_experiment(needed, **{path: value})) == expected


def test_no_field_of_the_method_is_left_out():
  """Fails where a new field of the method has no test of where it lands."""
  tested = {*LANDS, *(f"optimizer.{name}" for name in OPTIMIZERS),
            "model.pretrained"}  # tests/test_trained.py
  assert {path for path in FIELDS
          if path.startswith(("model.", "attack.", "loss.", "optimizer."))} <= tested


def test_the_model_of_an_experiment():
  """Fails with the classes or the domains of something else, or without pmap's axis."""
  experiment = make_experiment(FINE_GRAINED)
  model = experiment.method.model
  assert model.num_classes == experiment.train_source.num_classes == 10
  assert model.domains == ("clean", "autoaugment", "adversarial")
  assert model.axis_name == experiment.method.axis_name == "replicas"
  assert (len(experiment.train_source), len(experiment.test_source)) == (100, 12)


def test_what_a_fresh_state_holds():
  """Fails where train.ema_decay=0 keeps averages, or the seed makes neither weights nor noise."""
  for decay in (0.0, 0.9):
    experiment = make_experiment({"train.ema_decay": decay})
    state = jax.eval_shape(functools.partial(fresh_state, experiment))
    assert set(state.ema) == (set(state.variables) if decay else set())
  states = [fresh_state(make_experiment({"seed": seed})) for seed in (0, 1)]
  kernels = [state.params["classifier"]["kernel"] for state in states]
  assert np.any(kernels[0] != kernels[1])
  assert np.any(states[0].key != states[1].key)


DEFAULTS = {"name": "rmsprop", "weight_decay": 1e-5, "form": "l2", "decay_batch_norm": False,
            "momentum": 0.9, "nesterov": False, "rms_decay": 0.9, "epsilon": 1e-3, "b1": 0.9,
            "b2": 0.999}
RATES = {"schedule": "exponential", "peak": 0.016, "warmup": 0, "decay_rate": 0.97, "decay": 12}
SGD = {"optimizer.name": "sgd"}
ADAMW = {"optimizer.name": "adamw", "optimizer.weight_decay_form": "decoupled"}
_ADAMW = {"name": "adamw", "form": "decoupled"}
STRONG = {"optimizer.weight_decay": 0.1}

# field: (value, settings of the optimizer that differ, of the rates, other fields that it needs)
OPTIMIZERS = {
    "name": ("sgd", {"name": "sgd"}, {}, {}),
    "learning_rate": (0.5, {}, {"peak": 0.5}, {}),
    "schedule": ("cosine", {}, {"schedule": "cosine"}, {}),
    "warmup_epochs": (1.0, {}, {"warmup": 5}, {}),
    "warmup_steps": (3, {}, {"warmup": 3}, {"optimizer.warmup_epochs": 2.0}),
    "decay_rate": (0.5, {}, {"decay_rate": 0.5, "decay": 5}, {"optimizer.decay_epochs": 1.0}),
    "decay_epochs": (0.4, {}, {"decay": 2}, {}),
    "decay_steps": (3, {}, {"decay": 3}, {}),
    "momentum": (0.5, {"momentum": 0.5}, {}, {}),
    "nesterov": (True, {"name": "sgd", "nesterov": True}, {}, SGD),
    "rms_decay": (0.5, {"rms_decay": 0.5}, {}, {}),
    "epsilon": (0.1, {"epsilon": 0.1}, {}, {}),
    "b1": (0.5, {**_ADAMW, "b1": 0.5}, {}, ADAMW),
    "b2": (0.5, {**_ADAMW, "b2": 0.5}, {}, ADAMW),
    "weight_decay": (0.1, {"weight_decay": 0.1}, {}, {}),
    "weight_decay_form": ("decoupled", {"weight_decay": 0.1, "form": "decoupled"}, {}, STRONG),
    "trainable": ("norms_and_classifier", {"trainable": "norms_and_classifier"}, {}, {}),
    "decay_batch_norm": (True, {"weight_decay": 0.1, "decay_batch_norm": True}, {}, STRONG),
}


def updated(optimizer):
  """All parameters after each of 7 updates."""
  params = {"conv": {"kernel": jnp.array([1.0, 2.0])}, "norm": {"scale": jnp.array([1.0, 3.0])}}
  gradients = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)

  def step(carry, gradient):
    params, state = carry
    gradient = {"conv": {"kernel": gradient[:2]}, "norm": {"scale": gradient[2:]}}
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), jnp.concatenate(jax.tree.leaves(params))

  return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1])()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_a_field_of_the_optimizer_lands(name):
  """The updates are those of the optimizer that is made with the expected settings by hand.

  Fails where a setting is dropped, swapped with another, or the schedule does not get to the chain.
  """
  value, settings, rates, needed = OPTIMIZERS[name]
  settings, rates = {**DEFAULTS, **settings}, {**RATES, **rates}
  needed = {"train.steps": 8, **needed}
  changed = make_experiment(needed, **{f"optimizer.{name}": value})
  schedule = SCHEDULES[rates["schedule"]](
      rates["peak"], 8, warmup=rates["warmup"], decay_rate=rates["decay_rate"],
      decay=rates["decay"])
  np.testing.assert_allclose([changed.schedule(step) for step in range(8)],
                             [schedule(step) for step in range(8)], rtol=1e-6)
  expected = create_optimizer(settings.pop("name"), schedule, settings.pop("weight_decay"),
                              settings.pop("form"), settings.pop("decay_batch_norm"), **settings)
  ours = updated(changed.method.optimizer)
  np.testing.assert_allclose(ours, updated(expected), rtol=1e-6)
  before = updated(make_experiment(needed).method.optimizer)
  assert np.max(np.abs(ours - before)) > 1e-4


TRICKS = {"attack.clean_start": 0.2, "attack.statistics": "batch", "attack.target": "random",
          "attack.dropout": True, "attack.label_smoothing": 0.3, "attack.ramp_steps": 50}
STRENGTH = {"attack.epsilon": 7.0, "attack.step_size": 2.0, "attack.num_steps": 3,
            "attack.norm": "l2"}


def test_the_evaluation_is_attacked_without_the_tricks_of_training():
  """Fails where the final attack starts clean, aims at a label, drops out, smooths or ramps."""
  experiment = make_experiment({**TRICKS, **STRENGTH})
  assert experiment.eval_attack == Attack(name="pgd", norm="l2", epsilon=7.0, step_size=2.0,
                                          num_steps=3)
  assert experiment.method.attack == Attack(
      name="pgd", norm="l2", epsilon=7.0, step_size=2.0, num_steps=3, clean_start=0.2,
      statistics="batch", target="random", dropout=True, label_smoothing=0.3, ramp_steps=50)


@pytest.mark.parametrize(("name", "fixed"), [
    ("ifgsm", {"clean_start": 1.0}), ("gd", {"clean_start": 1.0, "ball": False}),
    ("fgsm", {"clean_start": 1.0, "num_steps": 1, "step_size": 6.0})])
def test_the_evaluation_can_have_another_attacker(name, fixed):
  """Fails where the attacker's own settings do not follow from its name, in training or at the end.
  """
  strength = Attack(name=name, epsilon=6.0, step_size=1.5, num_steps=20)
  free = {} if name == "fgsm" else {"eval.step_size": 1.5, "eval.num_steps": 20}
  experiment = make_experiment({"eval.attack": name, "eval.epsilon": 6.0, **free})
  assert experiment.eval_attack == dataclasses.replace(strength, **fixed)
  experiment = make_experiment({"attack.name": name, "attack.epsilon": 6.0,
                                "attack.step_size": 1.5, "attack.num_steps": 20,
                                "loss.label_smoothing": 0.0})
  assert experiment.method.attack == experiment.eval_attack == dataclasses.replace(
      strength, **fixed)


def test_the_evaluators_have_the_attack_of_the_evaluation():
  """Fails where clean images are attacked, or the attack is the training's."""
  experiment = make_experiment({**TRICKS, **STRENGTH})
  attacks = {name: one.attack for benchmark in benchmarks(experiment).values()
             for name, one in benchmark.passes.items()}
  assert attacks == {CLEAN: None, MAIN: experiment.eval_attack, AUXILIARY: experiment.eval_attack}


def test_an_epoch_of_the_same_budget_is_shorter():
  """Mei et al.: epochs that cost what vanilla's would, 4/5 + 2/5 = 1.2 passes an image.

  Fails where the length, the schedule or the ramp of fast_advprop is counted in whole epochs.
  """
  times = {"train.epochs": 12.0, "optimizer.warmup_epochs": 3.0, "optimizer.decay_epochs": 6.0,
           "optimizer.decay_rate": 0.5, "attack.ramp_epochs": 6.0}
  vanilla = make_experiment({**times, "scheme": "vanilla"})
  fast = make_experiment({**times, **FAST})
  assert vanilla.steps_per_epoch == fast.steps_per_epoch == STEPS_PER_EPOCH
  assert (vanilla.total_steps, fast.total_steps) == (60, 50)
  assert (vanilla.method.attack.ramp_steps, fast.method.attack.ramp_steps) == (30, 25)
  peak = vanilla.config.optimizer.learning_rate
  for experiment, warmup, decay in ((vanilla, 15, 30), (fast, round(2.5 * 5), 25)):
    rates = [float(experiment.schedule(step)) / peak
             for step in (warmup - 1, warmup, decay - 1, decay)]
    np.testing.assert_allclose(rates, [(warmup - 1) / warmup, 1, 1, 0.5], rtol=1e-5)


def test_steps_are_no_epochs():
  """Fails where a length that is given in steps is divided by the scheme's budget."""
  assert make_experiment({**FAST, "train.steps": 60}).total_steps == 60


def test_an_epoch_need_not_be_whole():
  """Fails where the steps of an epoch are rounded before they are counted."""
  experiment = make_experiment({"data.batch_size": 40, "train.epochs": 3.0,
                                "eval.every_epochs": 1.0})
  assert math.isclose(experiment.steps_per_epoch, 2.5)
  assert experiment.total_steps == round(7.5)
  assert experiment.every("eval") == 2.5


def test_the_attack_of_the_evaluation_is_the_one_named():
  """Fails where something of the training's attacker, such as GD's missing ball, is left in it."""
  attack = make_experiment({"attack.name": "gd", "eval.attack": "pgd"}).eval_attack
  assert (attack.ball, attack.clean_start) == (True, 0.0)
  attack = make_experiment({"attack.name": "fgsm", "eval.attack": "pgd"}).eval_attack
  assert (attack.num_steps, attack.step_size) == (5, 1.0)
