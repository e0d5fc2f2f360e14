"""Configs: the default one, what may be changed in it, and what cannot work.

A config file starts from `default_config()` and sets what its experiment needs:

    from advprop_jax.runtime.config import default_config

    def get_config():
      config = default_config()
      config.attack.epsilon = 1.0
      return config

`validate` refuses what cannot work, before anything is read or written.
"""

import difflib
import math
from collections.abc import Collection
from typing import Any

import ml_collections

from advprop_jax import models
from advprop_jax.errors import InputError
from advprop_jax.method.schemes import SCHEMES, SECOND_VIEW, Scheme
from advprop_jax.models.network import Network
from advprop_jax.runtime.fields import FIELDS, Field
from advprop_jax.runtime.parallel import AXIS


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


def validate(config: ml_collections.ConfigDict, devices: int = 1, processes: int = 1) -> None:
  """Raises an InputError for the first thing in a config that cannot work.

  Args:
    config: a resolved config.
    devices: the number of devices, over all processes, that it is to run on.
    processes: the number of these.
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
  _check_together(values, devices, processes, scheme)


def require_known(path: str) -> None:
  """Raises an InputError unless FIELDS has the field, and says which one may be meant."""
  if path not in FIELDS:
    close = difflib.get_close_matches(path, FIELDS, 1)
    meant = f"did you mean config.{close[0]}?" if close else (
        "the fields stand in advprop_jax/runtime/fields.py")
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


def create_network(config: ml_collections.ConfigDict, num_classes: int) -> Network:
  """The network of a resolved config, to be run on the devices of AXIS, with the scheme's domains.

  Args:
    config: or its JSON.
    num_classes: number of logits.
  """
  bank = config["model"]
  return models.create_model(
      bank["name"], num_classes, create_scheme(config).domains, dtype=bank["dtype"],
      share_statistics=bank["share_statistics"], share_affine=bank["share_affine"], axis_name=AXIS,
      group_size=bank["bn_group_size"], dropout_rate=bank["dropout_rate"],
      drop_path_rate=bank["drop_path_rate"], input_convention=bank["input_convention"],
      remat=bank.get("remat", False))  # runs of before this field are read too


def _check_scheme(values: dict[str, Any], scheme: Scheme) -> None:
  """Raises an InputError where the scheme and its settings do not fit each other."""
  name, prefix = values["scheme"], "loss.weights."
  names = list(SCHEMES[name].weights)
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
  if scheme.pieces > 1 and len(scheme.made) < len(scheme.parts):
    raise InputError(f"config.loss.weights: scheme {name!r} deals its images out to "
                     f"{', '.join(part.name for part in scheme.parts)}; give each a weight above 0")
  views, second = {part.source for part in scheme.parts}, values["data.second_augment"]
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
  for path in ("model.share_statistics", "model.share_affine"):
    if values[path] and len(scheme.domains) == 1:
      raise InputError(f"config.{path}=True: scheme {name!r} has one domain, which has nothing to "
                       "share; give False")
  if any(part.start_weight for part in scheme.made):
    for path, needed in {"attack.num_steps": 1, "attack.statistics": "batch",
                         "attack.target": "none", "attack.dropout": True,
                         "attack.label_smoothing": None}.items():
      if values[path] != needed:
        raise InputError(f"config.{path}={values[path]!r}: the one attack step of scheme {name!r} "
                         f"is a pass of training too; give {needed!r}")


def _check_attack(values: dict[str, Any]) -> None:
  """Raises an InputError where a setting would have no effect on the attacker that is named."""
  name, measured = values["attack.name"], values["eval.attack"] or values["attack.name"]
  if "gd" in (name, measured) and values["attack.norm"] != "linf":
    raise InputError(f"config.attack.norm={values['attack.norm']!r}: attacker 'gd' has no ball "
                     "and steps along the gradient's sign; give 'linf', or another attacker")
  if name != "pgd" and values["attack.clean_start"]:
    raise InputError(f"config.attack.clean_start={values['attack.clean_start']:g}: attacker "
                     f"{name!r} always starts at the image; give 0, or 'pgd' as "
                     "config.attack.name")
  if name == "gd" and (values["attack.ramp_steps"] or values["attack.ramp_epochs"]):
    raise InputError("config.attack.ramp_epochs: attacker 'gd' has no epsilon that could grow; "
                     "give 0")
  for path in ("eval.num_steps", "eval.step_size"):
    if measured == "fgsm" and values[path] is not None:
      raise InputError(f"config.{path}={values[path]:g}: attacker 'fgsm' makes one step of "
                       "epsilon; leave it unset, or give another config.eval.attack")


def _check_together(values: dict[str, Any], devices: int, processes: int, scheme: Scheme) -> None:
  """Raises an InputError where fields do not fit each other or the devices."""
  _check_attack(values)
  for path, pieces in {
      "data.batch_size": devices * values["train.accumulation"] * scheme.pieces,
      "eval.batch_size": devices}.items():
    size = values[path]
    if size % pieces:
      of = f"{devices} devices" + (f" of {processes} processes" if processes > 1 else "")
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
  """The fields that differ, "path: saved -> config" each.

  Args:
    config: as it is given.
    saved: of a run, perhaps from before some fields were there: these had their defaults.
    ignored: sections or fields that may differ.
  """
  new, old = flatten(config), flatten(saved)
  for path in new.keys() - old.keys():
    default = FIELDS[path].default if path in FIELDS else None
    old[path] = new[path] if default is None else default
  return [f"{path}: {old.get(path)!r} -> {new.get(path)!r}" for path in sorted(old | new)
          if old.get(path) != new.get(path)
          and not any(path == name or path.startswith(name + ".") for name in ignored)]


def duration(values: ml_collections.ConfigDict, name: str, steps_per_epoch: float) -> int:
  """Steps of `<name>_steps` (or `steps`) where it is set, else of `<name>_epochs` (or `epochs`)."""
  prefix = name + "_" if name else ""
  steps = values[prefix + "steps"]
  return round(values[prefix + "epochs"] * steps_per_epoch) if steps is None else steps
