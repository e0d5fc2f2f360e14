"""Every field of a config: its default, what it means, and what it may be.

A config file starts from `default_config()` and sets what its experiment needs:

    from advprop_jax.runtime.config import default_config

    def get_config():
      config = default_config()
      config.attack.epsilon = 1.0
      return config

`validate` refuses what cannot work, before anything is read or written.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection
from typing import Any

import ml_collections

from advprop_jax import models
from advprop_jax.data.transforms import AUGMENTATIONS
from advprop_jax.errors import InputError
from advprop_jax.method import attack, optimizer
from advprop_jax.method.schemes import SCHEMES, SECOND_VIEW, Scheme

Check = Callable[[Any], str | None]  # a value -> what would do, or None where it will do


def one_of(names: Collection[str]) -> Check:
  """A name out of a few."""
  def check(value):
    close = difflib.get_close_matches(str(value), names, 1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return None if value in names else f"one of {', '.join(sorted(names))}{meant}"

  return check


def between(low: float, high: float = float("inf"), open_high: bool = False) -> Check:
  """A number in [low, high], or in [low, high) if open_high."""
  text = f"at least {low}" if high == float("inf") else (
      f"at least {low} and {'below' if open_high else 'at most'} {high}")

  def check(value):
    return None if low <= value < high or (value == high and not open_high) else text

  return check


def known_network(name: str) -> str | None:
  """The name of a network, with or without timm's tf_."""
  return one_of(models.NAMES)(name.removeprefix("tf_"))


def anything(value: Any) -> None:
  """No condition but the type."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One field: its default (None: not set), its type, what it means, and what it may be."""

  default: Any
  type: type
  meaning: str
  check: Check = anything


POSITIVE, NOT_NEGATIVE, SHARE = between(1), between(0), between(0, 1)

FIELDS = {
    "scheme": Field("advprop", str, "what a mini-batch becomes", one_of(SCHEMES)),
    "seed": Field(0, int, "of weights, data order, attack and dropout", between(0, 2**32 - 1)),

    "model.name": Field("efficientnet_b0", str, "network", known_network),
    "model.dtype": Field("float32", str, "compute type", one_of(("float32", "bfloat16"))),
    "model.dropout_rate": Field(None, float, "before the classifier; not set: the network's own",
                                between(0, 1, open_high=True)),
    "model.drop_path_rate": Field(None, float, "stochastic depth of the last block; not set: the "
                                  "network's own", between(0, 1, open_high=True)),
    "model.share_statistics": Field(False, bool, "one mean and variance for all domains"),
    "model.share_affine": Field(False, bool, "one scale and bias for all domains"),
    "model.bn_group_size": Field(1, int, "replicas whose batches are normalised as one", POSITIVE),

    "attack.name": Field("pgd", str, "attacker", one_of(attack.ATTACKS)),
    "attack.norm": Field("linf", str, "of ball and step", one_of(attack.NORMS)),
    "attack.epsilon": Field(4.0, float, "radius of the ball, 0-255 units", NOT_NEGATIVE),
    "attack.step_size": Field(1.0, float, "of one step, 0-255 units", NOT_NEGATIVE),
    "attack.num_steps": Field(5, int, "steps", NOT_NEGATIVE),
    "attack.clean_start": Field(0.0, float, "probability of a start without noise", SHARE),
    "attack.statistics": Field("running", str, "batch norm of the attacked network",
                               one_of(attack.STATISTICS)),
    "attack.target": Field("none", str, "away from the label, or towards another",
                           one_of(attack.TARGETS)),
    "attack.dropout": Field(False, bool, "dropout in the attacked network"),
    "attack.label_smoothing": Field(None, float, "of the attacked loss; not set: the same",
                                    SHARE),
    "attack.ramp_epochs": Field(0.0, float, "over which epsilon grows from 0", NOT_NEGATIVE),
    "attack.ramp_steps": Field(None, int, "in place of ramp_epochs", NOT_NEGATIVE),
    "attack.one_in": Field(None, int, "of fast_advprop: attacks one image in so many; not set: 5",
                           between(2)),

    "data.name": Field("bundled", str, "'bundled', 'folder' (of class folders), or a TFDS data set "
                       "prepared as array_record"),
    "data.dir": Field(None, str, "folder of TFDS data sets, local or gs://, or that holds "
                      "train/CLASS/ and test/CLASS/"),
    "data.broken": Field("fatal", str, "files of class folders that do not decode: an error, or "
                         "left out", one_of(("fatal", "skip"))),
    "data.train_split": Field("train", str, "split to train on"),
    "data.test_split": Field("test", str, "split to evaluate on"),
    "data.image_size": Field(None, int, "height and width, pixels; not set: the network's own",
                             POSITIVE),
    "data.batch_size": Field(128, int, "images per update, over all devices", POSITIVE),
    "data.augment": Field("crop_flip", str, "of training images", one_of(AUGMENTATIONS)),
    "data.second_augment": Field(None, str, "of the second view, for fine_grained",
                                 one_of(AUGMENTATIONS)),
    "data.padding": Field(4, int, "of a random crop, pixels on each side", NOT_NEGATIVE),
    "data.num_threads": Field(2, int, "that read and decode; 0: in the main one", NOT_NEGATIVE),

    "loss.label_smoothing": Field(0.1, float, "of the loss, also of the attacked one", SHARE),
    **{f"loss.weights.{name}": Field(None, float, "of these images' loss; not set: the scheme's",
                                     NOT_NEGATIVE)
       for name in dict.fromkeys(part.name for scheme in SCHEMES.values()
                                 for part in scheme.parts)},

    "optimizer.name": Field("rmsprop", str, "optimizer", one_of(optimizer.OPTIMIZERS)),
    "optimizer.learning_rate": Field(0.016, float, "highest one", NOT_NEGATIVE),
    "optimizer.schedule": Field("exponential", str, "of the learning rate",
                                one_of(optimizer.SCHEDULES)),
    "optimizer.warmup_epochs": Field(0.0, float, "linear warm-up", NOT_NEGATIVE),
    "optimizer.warmup_steps": Field(None, int, "in place of warmup_epochs", NOT_NEGATIVE),
    "optimizer.decay_rate": Field(0.97, float, "of schedule exponential", between(0, 1)),
    "optimizer.decay_epochs": Field(2.4, float, "between two decays", between(1e-6)),
    "optimizer.decay_steps": Field(None, int, "in place of decay_epochs", POSITIVE),
    "optimizer.momentum": Field(0.9, float, "of rmsprop and sgd", between(0, 1, open_high=True)),
    "optimizer.nesterov": Field(False, bool, "Nesterov momentum, of sgd"),
    "optimizer.rms_decay": Field(0.9, float, "of rmsprop", between(0, 1, open_high=True)),
    "optimizer.epsilon": Field(1e-3, float, "of rmsprop and adamw", NOT_NEGATIVE),
    "optimizer.b1": Field(0.9, float, "of adamw", between(0, 1, open_high=True)),
    "optimizer.b2": Field(0.999, float, "of adamw", between(0, 1, open_high=True)),
    "optimizer.weight_decay": Field(1e-5, float, "weight decay", NOT_NEGATIVE),
    "optimizer.weight_decay_form": Field("l2", str, "in the loss, or of the weights themselves",
                                         one_of(optimizer.DECAY_FORMS)),
    "optimizer.decay_batch_norm": Field(False, bool, "scales and biases of batch norms decay too"),

    "train.epochs": Field(350.0, float, "length of training", NOT_NEGATIVE),
    "train.steps": Field(None, int, "in place of train.epochs", NOT_NEGATIVE),
    "train.accumulation": Field(1, int, "micro-batches per update", POSITIVE),
    "train.ema_decay": Field(0.9999, float, "of weights and statistics; 0: none",
                             between(0, 1, open_high=True)),
    "train.log_every": Field(50, int, "steps between two lines of metrics", POSITIVE),

    "eval.batch_size": Field(256, int, "images per step, over all devices", POSITIVE),
    "eval.every_epochs": Field(1.0, float, "between two evaluations on clean images; 0: at the "
                               "end alone", NOT_NEGATIVE),
    "eval.every_steps": Field(None, int, "in place of every_epochs", NOT_NEGATIVE),
    "eval.checkpoint": Field("newest", str, "of --mode=evaluate", one_of(("newest", "best"))),
    "eval.attack": Field(None, str, "name of the final attack; not set: the training's",
                         one_of(attack.ATTACKS)),
    "eval.epsilon": Field(None, float, "of the final attack; not set: the training's",
                          NOT_NEGATIVE),
    "eval.step_size": Field(None, float, "of the final attack; not set: the training's",
                            NOT_NEGATIVE),
    "eval.num_steps": Field(None, int, "of the final attack; not set: the training's",
                            NOT_NEGATIVE),

    "checkpoint.every_epochs": Field(1.0, float, "between two checkpoints; 0: at the end alone",
                                     NOT_NEGATIVE),
    "checkpoint.every_steps": Field(None, int, "in place of every_epochs", NOT_NEGATIVE),
    "checkpoint.keep": Field(2, int, "newest checkpoints kept, beside the best one", POSITIVE),
}


def default_config() -> ml_collections.ConfigDict:
  """A config with every field of FIELDS at its default; a field that is not set has its type."""
  config = ml_collections.ConfigDict()
  for path, field in FIELDS.items():
    *sections, name = path.split(".")
    section = config
    for key in sections:
      if key not in section:
        section[key] = ml_collections.ConfigDict()
      section = section[key]
    section[name] = (ml_collections.config_dict.placeholder(field.type)
                     if field.default is None else field.default)
  return config


def flatten(config: ml_collections.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
  """{"section.field": value} of a config or of its JSON."""
  flat = {}
  for name, value in dict(config).items():
    path = f"{prefix}{name}"
    if isinstance(value, ml_collections.ConfigDict | dict):
      flat |= flatten(value, path + ".")
    else:
      flat[path] = value
  return flat


def validate(config: ml_collections.ConfigDict, devices: int = 1) -> None:
  """Raises an InputError for the first thing in a config that cannot work.

  Args:
    config: a resolved config.
    devices: the number of devices, over all processes, that it is to run on.
  """
  values = flatten(config)
  for path in values:
    require_known(path)
  for path, field in FIELDS.items():
    if path not in values:
      raise InputError(f"config.{path}: missing; start the config from default_config(), which "
                       "has every field")
    _check_field(path, field, values[path])
  scheme = create_scheme(config)
  _check_scheme(values, scheme)
  _check_together(values, devices, scheme)


def require_known(path: str) -> None:
  """Raises an InputError unless FIELDS has the field, and says which one may be meant."""
  if path not in FIELDS:
    close = difflib.get_close_matches(path, FIELDS, 1)
    meant = f"did you mean config.{close[0]}?" if close else (
        "the fields stand in advprop_jax/runtime/config.py")
    raise InputError(f"config.{path}: there is no such field; {meant}")


def _check_field(path: str, field: Field, value: Any) -> None:
  """Raises an InputError unless the value is of the field's type and range."""
  if value is None and field.default is None:
    return
  right = isinstance(value, (int, float) if field.type is float else field.type)
  if not right or (isinstance(value, bool) and field.type is not bool):
    raise InputError(f"config.{path}={value!r}: is a {type(value).__name__}; "
                     f"give a {field.type.__name__}")
  if isinstance(value, float) and not math.isfinite(value):
    raise InputError(f"config.{path}={value!r}: give a finite number")
  would_do = field.check(value)
  if would_do:
    raise InputError(f"config.{path}={value!r}: give {would_do}")


def create_scheme(config: ml_collections.ConfigDict) -> Scheme:
  """The scheme of a config, with its weights and its pieces."""
  return SCHEMES[config["scheme"]].adjusted(config["loss"]["weights"], config["attack"]["one_in"])


def _check_scheme(values: dict[str, Any], scheme: Scheme) -> None:
  """Raises an InputError where the scheme and its settings do not fit each other."""
  name, prefix = values["scheme"], "loss.weights."
  names = [part.name for part in scheme.parts]
  for path, weight in values.items():
    if path.startswith(prefix) and weight is not None and path.removeprefix(prefix) not in names:
      raise InputError(f"config.{path}={weight:g}: scheme {name!r} has no such images; it has "
                       f"{', '.join(names)}")
  if not scheme.made or not any(part.domain == scheme.domains[0] for part in scheme.made):
    raise InputError(f"config.loss.weights: scheme {name!r} would train nothing through the main "
                     f"batch norms; give {names[0]} a weight above 0")
  if values["attack.one_in"] is not None and scheme.pieces == 1:
    raise InputError(f"config.attack.one_in={values['attack.one_in']}: scheme {name!r} attacks all "
                     "images; leave it unset, or give 'fast_advprop' as config.scheme")
  views, second = {part.source for part in scheme.made}, values["data.second_augment"]
  if (SECOND_VIEW in views) != (second is not None):
    would_do = ("'autoaugment' or 'randaugment'" if SECOND_VIEW in views
                else "None, or 'fine_grained' as config.scheme")
    raise InputError(f"config.data.second_augment={second!r}: scheme {name!r} has "
                     f"{'a' if SECOND_VIEW in views else 'no'} second view of its images; "
                     f"give {would_do}")
  images = {domain: sum(scheme.share(part) for part in scheme.made if part.domain == domain)
            for domain in scheme.domains}
  if values["model.share_statistics"] and len(set(images.values())) > 1:
    raise InputError(f"config.model.share_statistics=True: the domains of scheme {name!r} have "
                     "unequal numbers of images; give False")
  if any(part.start_weight for part in scheme.made):
    for path, needed in {"attack.num_steps": 1, "attack.statistics": "batch",
                         "attack.target": "none"}.items():
      if values[path] != needed:
        raise InputError(f"config.{path}={values[path]!r}: the one attack step of scheme {name!r} "
                         f"is a pass of training too; give {needed!r}")


def _check_together(values: dict[str, Any], devices: int, scheme: Scheme) -> None:
  """Raises an InputError where fields do not fit each other or the devices."""
  if values["attack.name"] == "gd" and values["attack.norm"] != "linf":
    raise InputError(f"config.attack.norm={values['attack.norm']!r}: attacker 'gd' has no ball "
                     "and steps along the gradient's sign; give 'linf', or another attack.name")
  for path, pieces in {
      "data.batch_size": devices * values["train.accumulation"] * scheme.pieces,
      "eval.batch_size": devices}.items():
    size = values[path]
    if size % pieces:
      of = f"{devices} devices"
      if path == "data.batch_size":
        of += "".join(f" x {name}={factor}" for name, factor in {
            "train.accumulation": values["train.accumulation"],
            "pieces of the scheme": scheme.pieces}.items() if factor > 1)
      below, above = size // pieces * pieces, (size // pieces + 1) * pieces
      raise InputError(f"config.{path}={size}: {of} do not divide it; "
                       f"{f'{below} or {above}' if below else above} would do")
  if devices % values["model.bn_group_size"]:
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    raise InputError(f"config.model.bn_group_size={values['model.bn_group_size']}: does not divide "
                     f"{devices} devices; one of {', '.join(map(str, divisors))} would do")
  least = models.min_image_size(values["model.name"])
  size = values["data.image_size"]
  if size is not None and size < least:
    raise InputError(f"config.data.image_size={size}: too small for {values['model.name']}, which "
                     f"halves it down to nothing; give at least {least}")
  if values["optimizer.name"] == "adamw" and values["optimizer.weight_decay_form"] != "decoupled":
    raise InputError("config.optimizer.weight_decay_form='l2': the weight decay of adamw is "
                     "'decoupled'; give that, or rmsprop or sgd as config.optimizer.name")


def differences(config: dict, saved: dict, ignored: Collection[str] = ()) -> list[str]:
  """The fields that differ, "path: saved -> config" each; ignored holds sections or fields."""
  new, old = flatten(config), flatten(saved)
  return [f"{path}: {old.get(path)!r} -> {new.get(path)!r}" for path in sorted(old | new)
          if old.get(path) != new.get(path)
          and not any(path == name or path.startswith(name + ".") for name in ignored)]


def duration(values: ml_collections.ConfigDict, name: str, steps_per_epoch: float) -> int:
  """Steps of `<name>_steps` (or `steps`) where it is set, else of `<name>_epochs` (or `epochs`)."""
  prefix = name + "_" if name else ""
  steps = values[prefix + "steps"]
  return round(values[prefix + "epochs"] * steps_per_epoch) if steps is None else steps
