"""From a config to what a run is made of: data, network, method. Every verb starts here."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from advprop_jax import models, trained
from advprop_jax.data import folder, imagenet_folder, sources
from advprop_jax.data.transforms import (
  EvaluationTransform,
  evaluation_transform,
  published_crop,
)
from advprop_jax.errors import InputError
from advprop_jax.method import optimizer
from advprop_jax.method.attack import Attack, create_attack
from advprop_jax.method.schemes import Scheme
from advprop_jax.method.state import TrainState, create_train_state
from advprop_jax.method.step import Method
from advprop_jax.models import weights
from advprop_jax.runtime import agreement, parallel
from advprop_jax.runtime.compilation import Program
from advprop_jax.runtime.config import (
  create_network,
  create_scheme,
  duration,
  flatten,
  validate,
)
from advprop_jax.runtime.metrics import read_json
from advprop_jax.runtime.workdir import LATER, refuse_other_run


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config stands for.

  Attributes:
    config: the resolved config, every field set that training needs.
    train_source: records to train on.
    test_source: records to evaluate on.
    method: network, scheme, attack, optimizer.
    schedule: step -> learning rate.
    eval_attack: the attacker of the evaluation.
    steps_per_epoch: updates in which as many images are seen as there are; not always whole.
    total_steps: length of training, in updates.
  """

  config: ml_collections.FrozenConfigDict
  train_source: sources.Source
  test_source: sources.Source
  method: Method
  schedule: optimizer.Schedule
  eval_attack: Attack
  steps_per_epoch: float
  total_steps: int

  @property
  def evaluation_transform(self) -> EvaluationTransform:
    """What a test image goes through."""
    return evaluation_transform(self.config.data.image_size, self.config.data.crop_fraction)

  @property
  def made_of(self) -> dict:
    """What `method` is made of, and a fresh state, besides code; JSON."""
    return {"config": self.config.to_dict(), "classes": self.train_source.num_classes,
            "steps_per_epoch": self.steps_per_epoch, "total_steps": self.total_steps}

  def every(self, section: str) -> float:
    """Steps between two of `eval` or `checkpoint`, not always whole; 0: at the end alone."""
    settings = self.config[section]
    if settings.every_steps is not None:
      return settings.every_steps
    return settings.every_epochs * self.steps_per_epoch

  def due(self, step: int, every: float) -> bool:
    """Whether something is to be done after a step that is done every so many, and at the end."""
    if step == self.total_steps or not every:
      return step == self.total_steps
    return step // every > (step - 1) // every


def create_experiment(config: ml_collections.ConfigDict,
                      workdir: str | None = None) -> Experiment:
  """Opens the data and builds the method of a config.

  Args:
    config: from `runtime.config.default_config()`, changed at will.
    workdir: of the run; None for none.

  Returns:
    The experiment; nothing has been computed yet.

  Raises:
    InputError: a config or data that cannot work.
  """
  config = resolve(config, workdir)
  test_source = open_split(config.data, config.data.test_split)
  train_source = open_split(config.data, config.data.train_split, True)
  num_classes = train_source.num_classes
  check_classes(config, train_source.class_names, test_source.class_names)
  if config.attack.target != "none" and num_classes < 2:
    raise InputError(f"config.attack.target={config.attack.target!r}: there is no other label in "
                     f"data of {num_classes} class; give 'none'")
  scheme = create_scheme(config)
  steps_per_epoch = len(train_source) / config.data.batch_size
  # Of an epoch as the config means it.
  steps = steps_per_epoch / scheme.budget if scheme.same_budget else steps_per_epoch
  total_steps = duration(config.train, "", steps)
  if not total_steps and config.train.steps is None and config.train.epochs:
    raise InputError(f"config.train.epochs={config.train.epochs:g}: less than one step of "
                     f"{config.data.batch_size} images; give at least {1 / steps:.2g}, or 0")
  schedule = create_schedule(config.optimizer, steps, total_steps)
  attack = training_attack(config, steps)
  return Experiment(
      config=config, train_source=train_source, test_source=test_source,
      method=create_method(config, scheme, num_classes, schedule, attack),
      schedule=schedule, eval_attack=evaluation_attack(config),
      steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def check_classes(config: ml_collections.ConfigDict, train_names: tuple[str, ...],
                  test_names: tuple[str, ...], origin: str | None = None) -> None:
  """Raises an InputError if a label means another class in the test split than in training.

  Args:
    config: names the splits.
    train_names: of the classes that were trained, in the order of the labels.
    test_names: of the test split's classes.
    origin: what has train_names; None for the training split.
  """
  if train_names != test_names:
    ours, theirs = (sources.listed(sorted(set(a) - set(b)))
                    for a, b in ((train_names, test_names), (test_names, train_names)))
    raise InputError(
        f"config.data.test_split={config.data.test_split!r}: its classes are not those of "
        f"{origin or repr(config.data.train_split)} (there alone: {ours}; here alone: {theirs}); "
        "give splits of the same classes")


def open_split(data: ml_collections.ConfigDict, split: str, training: bool = False
               ) -> sources.Source:
  """Opens a split of what `config.data` names: class folders, the bundled set or TFDS data.

  With `training`, a split of ImageNet has to have all of its classes.
  """
  if data.name == "folder":
    return folder.open_folder(data.dir, split, data.broken)
  if data.name == imagenet_folder.NAME:
    return imagenet_folder.open_imagenet(data.dir, split, data.broken, training=training)
  return sources.open_source(data.name, data.dir, split)


def fresh_state(experiment: Experiment) -> TrainState:
  """The state that training starts from; `jax.eval_shape` of it tells what a checkpoint holds."""
  config, method = experiment.config, experiment.method
  return create_train_state(method.model, method.optimizer, config.seed, config.data.image_size,
                            ema=config.train.ema_decay > 0)


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where the weights of an initial state are from; its text says so.

  Attributes:
    network: the pretrained network; None for fresh weights.
    keeps_classifier: whether its classifier is in use.
  """

  network: trained.TrainedNetwork | None
  keeps_classifier: bool

  def __str__(self) -> str:
    if self.network is None:
      return "fresh"
    if not self.keeps_classifier:
      return (f"{self.network.source}; its classifier, of {self.network.num_classes} other "
              "classes, is left out: that of the data's classes starts fresh, at zero")
    unnamed = "" if self.network.class_names else (
        "; its classes have no names, and are taken to be the data's")
    return self.network.source + unnamed


def initial_state(experiment: Experiment,
                  meanwhile: Callable[[TrainState], None] | None = None
                  ) -> tuple[TrainState, Origin]:
  """The state that training starts from, and where its weights are from.

  Args:
    experiment: for its network, optimizer and seed.
    meanwhile: called, but in a pod, before the fresh state is there, while it is compiled where it
      has to be; with the state's shapes as they will be when it is `parallel.replicated`.

  Raises:
    InputError: config.model.pretrained cannot be read, or is of another network.
  """
  config = experiment.config
  network = None
  if config.model.pretrained is not None:
    network = trained.read(config.model.pretrained, config.model.name)
  fresh = Program(parallel.hurried(functools.partial(fresh_state, experiment)), "fresh_state",
                  experiment.made_of)
  if meanwhile and agreement.alone():
    meanwhile(parallel.replicated_shapes(fresh.start()))
  state = fresh()
  if network is None:
    return state, Origin(None, False)
  same_names = network.class_names in (None, experiment.train_source.class_names)
  variables, kept = weights.fitted(network.variables, jax.device_get(state.variables), same_names)
  variables = jax.tree.map(jnp.asarray, variables)
  batch_stats = {name: value for name, value in variables.items() if name != "params"}
  # Buffers of its own for the averages, or a step could not donate the state.
  ema = jax.tree.map(jnp.array, variables) if state.ema else {}
  return (state.replace(params=variables["params"], batch_stats=batch_stats, ema=ema),
          Origin(network, kept))


def resolve(config: ml_collections.ConfigDict, workdir: str | None = None,
            devices: int | None = None) -> ml_collections.FrozenConfigDict:
  """A valid frozen config in which what depends on the network and its weights is set.

  Args:
    config: as it is given.
    workdir: of the run; None for none.
    devices: that it is to run on; None for those that are here.

  Raises:
    InputError: the config cannot work, or its pretrained weights cannot be read.
  """
  config = ml_collections.ConfigDict(config).copy_and_resolve_references()
  number = (devices, 1) if devices else (jax.device_count(), jax.process_count())
  validate(config, *number)
  known = _of_weights(config, workdir)
  for path, value in known.items():
    section, field = path.split(".")
    if config[section][field] is None:
      config[section][field] = value
  validate(config, *number)
  return ml_collections.FrozenConfigDict(config)


def _of_weights(config, workdir):
  """What weights say of themselves, {field: value}.

  It is taken from the run that has begun, or from the weights that it is to begin with; without
  any, from the network as it is published.
  """
  published = {"data.image_size": models.image_size(config.model.name),
               "data.crop_fraction": published_crop(models.image_size(config.model.name)),
               "model.input_convention": "inception"}
  if config.model.pretrained is None:
    return published
  run = flatten(read_json(os.path.join(workdir, "config.json"))) if workdir else {}
  if run.get("model.pretrained") == config.model.pretrained:
    return {path: run.get(path) for path in published}
  if None not in map(flatten(config.to_dict()).get, published):
    return {}
  network = trained.read(config.model.pretrained, config.model.name)
  return {"data.image_size": network.image_size, "data.crop_fraction": network.crop_fraction,
          "model.input_convention": config.model.input_convention or network.convention}


def open_network(config: ml_collections.ConfigDict, workdir: str,
                 ignored: tuple[str, ...] = ()) -> trained.TrainedNetwork:
  """What a run has trained, or what `config.model.pretrained` names where none has begun.

  Args:
    config: that of the run; LATER sections may differ.
    workdir: of the run. Its data is not needed.
    ignored: further fields that may differ.

  Raises:
    InputError: bad config, or neither is there or can be read.
  """
  config = resolve(config, workdir)
  if trained.has_begun(workdir):
    refuse_other_run(config, workdir, (*LATER, *ignored))
    return trained.read_run(workdir, config.eval.checkpoint, config.export.weights)
  if config.model.pretrained is None:
    raise InputError(f"--workdir={workdir}: {trained.NOTHING}")
  network = trained.read(config.model.pretrained, config.model.name)
  return dataclasses.replace(
      network, input_convention=config.model.input_convention, dtype=config.model.dtype,
      image_size=config.data.image_size, crop_fraction=config.data.crop_fraction)


def create_schedule(settings: ml_collections.ConfigDict, steps_per_epoch: float,
                    total_steps: int) -> optimizer.Schedule:
  """Step -> learning rate, by `config.optimizer` of a validated config.

  The warm-up has whole steps, rounded down; epochs between two decays are not rounded, so that
  the decays do not drift from their epochs.

  Args:
    settings: config.optimizer.
    steps_per_epoch: not always whole.
    total_steps: length of training, in updates.

  *Source:* tensorflow/tpu, models/official/efficientnet/utils.py, build_learning_rate.
  """
  def steps(name):
    given = settings[f"{name}_steps"]
    return settings[f"{name}_epochs"] * steps_per_epoch if given is None else given

  return optimizer.SCHEDULES[settings.schedule](
      settings.learning_rate, total_steps, warmup=int(steps("warmup")),
      decay_rate=settings.decay_rate, decay=max(steps("decay"), 1))


def create_method(config: ml_collections.ConfigDict, scheme: Scheme, num_classes: int,
                  schedule: optimizer.Schedule, attack: Attack) -> Method:
  """The method of a validated config."""
  settings = config.optimizer
  return Method(
      model=create_network(config, num_classes), scheme=scheme, attack=attack,
      optimizer=optimizer.create_optimizer(
          settings.name, schedule, settings.weight_decay, settings.weight_decay_form,
          settings.decay_batch_norm, settings.trainable, momentum=settings.momentum,
          nesterov=settings.nesterov, rms_decay=settings.rms_decay, epsilon=settings.epsilon,
          b1=settings.b1, b2=settings.b2),
      label_smoothing=config.loss.label_smoothing, ema_decay=config.train.ema_decay,
      accumulation=config.train.accumulation, trainable=settings.trainable)


def training_attack(config: ml_collections.ConfigDict, steps_per_epoch: float) -> Attack:
  """The attacker of a validated config."""
  smoothing = config.attack.label_smoothing
  return create_attack(
      **_set_by_name(config), clean_start=config.attack.clean_start,
      statistics=config.attack.statistics, target=config.attack.target,
      dropout=config.attack.dropout, ramp_steps=duration(config.attack, "ramp", steps_per_epoch),
      label_smoothing=config.loss.label_smoothing if smoothing is None else smoothing)


def evaluation_attack(config: ml_collections.ConfigDict) -> Attack:
  """The attacker of a validated config without its tricks, as strong as config.eval says."""
  strength = {"name": config.eval.attack, "epsilon": config.eval.epsilon,
              "step_size": config.eval.step_size, "num_steps": config.eval.num_steps}
  return create_attack(**{**_set_by_name(config), **{
      name: value for name, value in strength.items() if value is not None}})


def _set_by_name(config):
  return {name: config.attack[name]
          for name in ("name", "norm", "epsilon", "step_size", "num_steps")}
