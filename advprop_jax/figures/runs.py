"""What workdirs say: configs, results and metrics; and which runs are seeds of one experiment."""

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from advprop_jax.errors import InputError
from advprop_jax.runtime.config import default_config, flatten
from advprop_jax.runtime.fields import FIELDS, names_in
from advprop_jax.runtime.metrics import read_json
from advprop_jax.runtime.workdir import LATER, SPEED

SUMMARY, EVALUATION, METRICS = "summary.json", "evaluation.json", "metrics.jsonl"
# Sections and fields in which runs of one experiment may differ, besides the seed.
ALIKE = ("seed", *LATER, *SPEED, "report", "data.dir")
SCHEME_NAMES = {"vanilla": "vanilla", "advprop": "AdvProp", "joint": "joint",
                "adversarial": "adversarial only", "fine_grained": "fine-grained AdvProp",
                "fast_advprop": "Fast AdvProp"}
Metrics = dict[str, dict[int, float]]    # name -> step -> value
Estimate = tuple[float, float | None]    # mean, and its standard error where it is known


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A workdir.

  Attributes:
    name: the last part of its path; numbered where another run of the page has it too.
    folder: where it is.
    config: its config.json.
    facts: "scheme", "network", "seed", "step", "weights", "data", "attack" of its results.
    results: {row: None or {"top1", "images", ...}}, fractions.
    details: {"corruptions", "imagenet_c", "strength": ...}, those that were measured.
    skipped: {benchmark: why}.
    notes: what a reader has to know of where the results are from.
  """

  name: str
  folder: str
  config: dict[str, Any]
  facts: dict[str, Any]
  results: dict[str, Any]
  details: dict[str, Any]
  skipped: dict[str, str]
  notes: tuple[str, ...] = ()

  @property
  def full_config(self) -> ml_collections.ConfigDict:
    """The config, with the defaults of fields that it is too old to know."""
    config, known = default_config(), flatten(self.config)
    with config.ignore_type():
      config.update_from_flattened_dict({path: known[path] for path in FIELDS if path in known})
    return config

  @property
  def experiment(self) -> dict[str, Any]:
    """All that runs have in common whose numbers may be averaged, {field: value}."""
    fields = {path: value for path, value in flatten(self.full_config).items()
              if not any(path == name or path.startswith(name + ".") for name in ALIKE)}
    return fields | {name: self.facts.get(name) for name in ("step", "weights", "data")}


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Runs of one experiment, which differ in their seed alone.

  Attributes:
    name: for people, unique among the groups of one network.
    label: the same, unique on the page.
    runs: at least one.
    place: how many groups of the same scheme and network are before it.
  """

  name: str
  label: str
  runs: tuple[Run, ...]
  place: int = 0

  @property
  def first(self) -> Run:
    return self.runs[0]

  @property
  def scheme(self) -> str:
    return self.first.facts["scheme"]

  @property
  def network(self) -> str:
    return self.first.facts["network"]


def read_runs(workdir: str, others: str | None) -> list[Run]:
  """The run of --workdir, then those of config.report.runs.

  Args:
    workdir: of the first run.
    others: workdirs with commas between; None for none.

  Raises:
    InputError: one of them does not exist, holds no run or no results, or is named twice.
  """
  named = [(f"--workdir={workdir}", workdir)]
  named += [(f"config.report.runs: {path!r}", os.path.expanduser(path))
            for path in filter(None, names_in(others or ""))]
  runs, places, seeds = [], {}, []
  for origin, folder in named:
    place = os.path.realpath(folder)
    if place in places:
      raise InputError(f"{origin} is the same run as {places[place]}; name each run once")
    places[place] = origin
    run = read_run(origin, folder, _free_name(folder, [run.name for run in runs]))
    key = (run.facts["seed"], run.experiment)
    if key in seeds:
      raise InputError(f"{origin} is the same run as {runs[seeds.index(key)].name!r}, with the "
                       "same config and seed, and would count twice; leave one of them out")
    runs.append(run)
    seeds.append(key)
  return runs


def read_run(origin: str, folder: str, name: str) -> Run:
  """One workdir; `origin` is how an InputError calls it."""
  if not os.path.isdir(folder):
    raise InputError(f"{origin}: there is no such folder; give workdirs of runs, with commas "
                     "between")
  if not os.path.exists(os.path.join(folder, "config.json")):
    raise InputError(f"{origin}: holds no run; give a folder that --mode=train was given as "
                     "--workdir")
  config = read_json(os.path.join(folder, "config.json"))
  if not config:
    raise InputError(f"{origin}: its config.json is not whole; bring it back")
  data = config.get("data", {})
  images = f"{data.get('name')}, {data.get('test_split')}"      # older files do not name them
  files = [read_json(os.path.join(folder, file)) for file in (SUMMARY, EVALUATION)]
  facts, notes = merged_results(*({"data": images, **file} if file else {} for file in files))
  if not any(facts.get("results", {}).values()):
    raise InputError(f"{origin}: holds no results ({SUMMARY} or {EVALUATION}); finish its "
                     "training, or run --mode=evaluate on it")
  missing = [fact for fact in ("scheme", "network", "seed") if fact not in facts]
  if missing:
    raise InputError(f"{origin}: its results name no {' and no '.join(missing)}; run "
                     "--mode=evaluate on it")
  facts = _cleaned(facts, folders(folder, config))
  results, details, skipped = (facts.pop(part, None) or {}
                               for part in ("results", "details", "skipped"))
  skipped = {kind: why for kind, why in skipped.items() if not _measured(kind, results, details)}
  return Run(name, folder, config, facts, results, details, skipped, notes)


def merged_results(summary: Mapping[str, Any], evaluation: Mapping[str, Any]
                   ) -> tuple[dict[str, Any], tuple[str, ...]]:
  """What is known of one run, and what a reader has to know of it.

  Rows of a later evaluation win. They are joined to those of the end of training only where both
  are of the same network on the same images: the same step, weights and data.

  Args:
    summary: summary.json, empty if there is none.
    evaluation: evaluation.json, likewise.
  """
  if not summary or not evaluation:
    return dict(summary or evaluation), ()
  same = {name: summary.get(name) == evaluation.get(name) for name in ("step", "weights")}
  if all(same.values()) and summary.get("data") == evaluation.get("data"):
    parts = {part: {**(summary.get(part) or {}), **_said(evaluation.get(part) or {})}
             for part in ("results", "details", "skipped")}
    return {**summary, **evaluation, **parts}, ()
  if all(same.values()):
    return dict(summary), (
        f"{EVALUATION} is of other images ({evaluation.get('data')}) and is left out.",)
  newest = max((evaluation, summary), key=lambda file: file.get("step") or 0)
  used, other = (EVALUATION, SUMMARY) if newest is evaluation else (SUMMARY, EVALUATION)
  left = summary if newest is evaluation else evaluation
  return dict(newest), (
      f"all results are those of {used} (step {newest.get('step')}, {newest.get('weights')}); "
      f"{other} is of step {left.get('step')}, {left.get('weights')}, and is left out.",)


def groups_of(runs: Sequence[Run]) -> list[Group]:
  """The runs by experiment, in the order of their first run."""
  experiments, members = [], []
  for run in runs:
    if run.experiment not in experiments:
      experiments.append(run.experiment)
      members.append([])
    members[experiments.index(run.experiment)].append(run)
  networks = {run.facts["network"] for run in runs}
  groups = []
  for mine, own in zip(experiments, members, strict=True):
    facts = own[0].facts
    twins = [other for other, theirs in zip(experiments, members, strict=True)
             if theirs[0].facts["scheme"] == facts["scheme"]
             and theirs[0].facts["network"] == facts["network"]]
    scheme = [SCHEME_NAMES.get(facts["scheme"], facts["scheme"])]
    network = [facts["network"]] if len(networks) > 1 else []
    special = [f"{path} {mine[path]}" for path in mine
               if any(twin.get(path) != mine[path] for twin in twins)]
    place = sum((group.scheme, group.network) == (facts["scheme"], facts["network"])
                for group in groups)
    groups.append(Group(", ".join(scheme + special), ", ".join(scheme + network + special),
                        tuple(own), place))
  return groups


def by_network(groups: Sequence[Group]) -> dict[str, list[Group]]:
  """{network: its groups}; what differs in the network is not drawn in one figure.

  The key is "" where there is one network, which then need not be named.
  """
  networks = list(dict.fromkeys(group.network for group in groups))
  return {network if len(networks) > 1 else "": [
      group for group in groups if group.network == network] for network in networks}


def average(values: Sequence[float]) -> Estimate:
  """Mean and standard error of the mean, which is None of a single value."""
  if len(values) < 2:
    return statistics.fmean(values), None
  return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def accuracy(row: Mapping[str, Any]) -> Estimate:
  """Top-1 of a row and its standard error over the images, fractions."""
  error = row.get("standard_error")
  if error is None and row.get("images"):
    error = math.sqrt(row["top1"] * (1 - row["top1"]) / row["images"])
  return row["top1"], error


def attack_of(run: Run, row: str) -> Mapping[str, Any] | None:
  """The attack behind a row; rows of older files have theirs in the summary."""
  of_file = run.facts.get("attack") if row.startswith("adversarial") else None
  return run.results[row].get("attack", of_file)


def conditions(run: Run, row: str) -> tuple:
  """How a row was measured: numbers that were measured otherwise are not averaged."""
  found = run.results[row]
  return found.get("images"), attack_of(run, row), found.get("restarts", 1)


def group_accuracy(group: Group, row: str) -> tuple[Estimate, int] | None:
  """Top-1 of a group, a fraction, and of how many runs.

  The standard error is that over seeds; of one run, that over its images. None where no run has
  that row, or where runs were not measured alike.
  """
  having = [run for run in group.runs if run.results.get(row)]
  rows = [run.results[row] for run in having]
  if not rows or any(conditions(run, row) != conditions(having[0], row) for run in having):
    return None
  return (accuracy(rows[0]) if len(rows) == 1 else average([each["top1"] for each in rows]),
          len(rows))


def read_metrics(folder: str) -> Metrics:
  """{name: {step: value}} of metrics.jsonl, without nulls and lines that are not whole."""
  metrics: Metrics = {}
  try:
    with open(os.path.join(folder, METRICS), encoding="utf-8") as file:
      lines = file.read().splitlines()
  except OSError:
    return {}
  for line in lines:
    try:
      values = json.loads(line)
      step = values.pop("step")
    except (ValueError, KeyError, AttributeError, TypeError):
      continue
    for name, value in values.items():
      if value is not None:
        metrics.setdefault(name, {})[step] = value
  return metrics


def folders(folder: str, config: Mapping[str, Any]) -> list[str]:
  """Those that messages about a run may name."""
  data, pretrained = (config.get(section, {}).get(field) or "" for section, field in (
      ("data", "dir"), ("model", "pretrained")))
  return [folder, os.path.abspath(folder), data, os.path.expanduser(data), pretrained]


def without_folders(text: str, known: Sequence[str] = ()) -> str:
  """Text in which every path is its last part, so that the page says nothing of the machine.

  Args:
    text: of a message.
    known: folders that may be in it, and may have blanks in their names.
  """
  for folder in sorted(filter(None, known), key=len, reverse=True):
    text = text.replace(folder.rstrip("/"), os.path.basename(os.path.abspath(folder)))
  return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s'\",;:()/]+/)*([^\s'\",;:()/]+)/?", r"\1", text)


def _cleaned(data: Any, known: Sequence[str]) -> Any:
  """JSON in which no text names a folder of this machine."""
  if isinstance(data, str):
    return without_folders(data, known)
  if isinstance(data, dict):
    return {_cleaned(name, known): _cleaned(value, known) for name, value in data.items()}
  return [_cleaned(value, known) for value in data] if isinstance(data, list) else data


def _said(part):
  return {name: value for name, value in part.items() if value is not None}


def _measured(kind, results, details):
  rows = [row.get("benchmark") for row in results.values() if row]
  return kind in rows or kind in details


def _free_name(folder: str, taken: Sequence[str]) -> str:
  name = os.path.basename(os.path.abspath(folder))
  number = sum(other == name or other.startswith(f"{name} (") for other in taken)
  return f"{name} ({number + 1})" if number else name
