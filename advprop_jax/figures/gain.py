"""Network size against what a scheme gains over vanilla training."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from matplotlib.ticker import FuncFormatter

from advprop_jax import models
from advprop_jax.errors import InputError
from advprop_jax.figures.page import Section, evaluate_command, listed
from advprop_jax.figures.runs import (
  SCHEME_NAMES,
  Estimate,
  Group,
  average,
  conditions,
  group_accuracy,
)
from advprop_jax.figures.style import GREY, INK, Panel, draw, look
from advprop_jax.trained import read_classes

BASELINE = "vanilla"
# Row of the results -> title of the panel.
ROWS = {"clean": "Gain on clean images", "corruptions": "Gain on corrupted images",
        "imagenet_c": "Gain on ImageNet-C"}
DODGE = 1.12            # what is at one size is drawn so much aside, to be seen
# Fields in which a scheme and its baseline may differ.
SCHEME_FIELDS = ("scheme", "attack", "loss.weights", "model.share_statistics",
                 "model.share_affine", "data.second_augment")


@dataclasses.dataclass(frozen=True)
class Gain:
  """Of a group over its baseline.

  Attributes:
    group: whose gain it is.
    baseline: the vanilla group of the same network and data.
    millions: of parameters, of the network that is deployed.
    points: percentage points of top-1.
    error: its standard error.
    seeds: pairs of runs of the same seed that it is the mean of; 0 where none were paired.
  """

  group: Group
  baseline: Group
  millions: float
  points: float
  error: float | None
  seeds: int


def gains(groups: Sequence[Group], row: str) -> list[Gain]:
  """Of every group that has a baseline, where both have that row."""
  result = []
  for group in groups:
    baseline = baseline_of(group, groups)
    if baseline is None:
      continue
    found = difference(group, baseline, row)
    if found:
      (mean, error), seeds = found
      result.append(Gain(group, baseline, parameters(group) / 1e6, 100 * mean,
                         None if error is None else 100 * error, seeds))
  return result


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
  """The vanilla group of the same network and test images that differs least; None if none."""
  if group.scheme == BASELINE:
    return None
  settings = group.first.experiment

  def distance(other):
    theirs = other.first.experiment
    return sum(settings.get(path) != theirs.get(path) for path in {**settings, **theirs}
               if not path.startswith(SCHEME_FIELDS))

  fitting = [other for other in groups if other.scheme == BASELINE
             and all(other.first.facts.get(fact) == group.first.facts.get(fact)
                     for fact in ("network", "data"))]
  return min(fitting, key=distance, default=None)


def difference(group: Group, baseline: Group, row: str) -> tuple[Estimate, int] | None:
  """Top-1 of a group less that of its baseline, fractions, and how many seeds were paired.

  None where either has no such row, or not all were measured alike.

  Two or more common seeds: the mean of their differences and its standard error. Else the
  difference of the means, and the standard errors of both, added as those of independent numbers.
  """
  ours, theirs = ({run.facts["seed"]: run.results[row]["top1"] for run in each.runs
                   if run.results.get(row)} for each in (group, baseline))
  measured = [conditions(run, row) for each in (group, baseline) for run in each.runs
              if run.results.get(row)]
  if any(each != measured[0] for each in measured):
    return None
  common = sorted(ours.keys() & theirs.keys())
  if len(common) > 1:
    return average([ours[seed] - theirs[seed] for seed in common]), len(common)
  both = [group_accuracy(each, row) for each in (group, baseline)]
  if None in both:
    return None
  ((mean, error), _), ((base, base_error), _) = both
  errors = (error, base_error)
  return (mean - base, None if None in errors else math.hypot(*errors)), 0


def parameters(group: Group) -> int:
  """How many the deployed network has; an InputError where the run's classes.json is missing."""
  model = models.create_model(group.network, len(read_classes(group.first.folder)))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def section(groups: Sequence[Group]) -> Section:
  """The figures of network size and gain."""
  title = "Gain over vanilla training, by network size"
  try:
    found = {row: each for row in ROWS if (each := gains(groups, row))}
  except InputError as error:
    return Section(title, reason=f"{error}.")
  if not found:
    first = groups[0].first
    other = "advprop" if groups[0].scheme == BASELINE else BASELINE
    return Section(title, reason=(
        f"there is no pair of a vanilla run and another one of the same network and test images; "
        f"train {first.facts['network']} with --config.scheme={other} (or that variant of its "
        "config), and name its workdir in --config.report.runs."))
  panels = [_panel(row, each) for row, each in found.items()]
  pairs = list(dict.fromkeys(f"{gain.group.label} less {gain.baseline.label}"
                             for gain in itertools.chain(*found.values())))
  seeds = [gain.seeds for gain in itertools.chain(*found.values())]
  captions = [
      "Top-1 of a scheme less that of vanilla training, in percentage points, by the number of "
      f"parameters of the deployed network: {listed(pairs)}. Above the line at 0 the scheme is "
      "ahead. " + _error_words(seeds)]
  if len(pairs) > len({gain.group.network for gain in found[next(iter(found))]}):
    captions.append("Schemes of one network stand side by side around its number of parameters.")
  if len({gain.group.network for gain in found[next(iter(found))]}) == 1:
    captions.append("There is one network: how the gain grows with size needs runs of several.")
  if "corruptions" not in found and "imagenet_c" not in found:
    captions.append("On corrupted images not both of a pair were measured, or not alike; "
                    + evaluate_command(groups[0].first, "clean,adversarial,corruptions") + ".")
  return Section(title, captions, panels)


def _error_words(seeds: Sequence[int]) -> str:
  words = []
  if any(seeds):
    words.append(f"one standard error of the mean over pairs of runs of one seed ({max(seeds)} at "
                 "most)")
  if 0 in seeds:
    words.append("where seeds are not paired, the standard errors of both sides together (over "
                 "seeds, or over the images of a single run), as if they were independent: wider "
                 "than need be, since both see the same images")
  return f"Error bars: {'; '.join(words)}."


def _panel(row: str, found: Sequence[Gain]) -> Panel:
  sizes = {gain.group.network: gain.millions for gain in found}
  rivals = {network: [gain for gain in found if gain.group.network == network]
            for network in sizes}
  names = {gain.group.scheme: SCHEME_NAMES.get(gain.group.scheme, gain.group.scheme)
           for gain in found}

  def plot(axes):
    axes.axhline(0, color=INK, linewidth=1)
    waiting = dict(names)
    for gain in found:
      style, others = look(gain.group), rivals[gain.group.network]
      aside = DODGE ** (others.index(gain) - (len(others) - 1) / 2)
      axes.errorbar(gain.millions * aside, gain.points, yerr=gain.error or 0, color=style.colour,
                    marker=style.marker, linestyle="none", capsize=3, markersize=6,
                    label=waiting.pop(gain.group.scheme, None))
      if len(others) == 1:
        axes.annotate(f"{gain.points:+.2f}", (gain.millions, gain.points), (7, 0), va="center",
                      textcoords="offset points", fontsize=8.5)
    for network, size in sizes.items():
      axes.annotate(network, (size, 0), (-6, 4), xycoords=axes.get_xaxis_transform(), rotation=90,
                    textcoords="offset points", ha="right", va="bottom", color=GREY, fontsize=8.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(sizes.values()), 2 * max(sizes.values()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(
        lambda value, _: f"{value:g}" if len(sizes) == 1 else ""))
    axes.set(xlabel="parameters (millions)", ylabel="gain (percentage points)")

  said = "; ".join(f"{gain.group.label}, {gain.millions:.2f} million: {gain.points:+.2f}"
                   + (f" ± {gain.error:.2f}" if gain.error is not None else "") for gain in found)
  return draw(f"gain_{row}", ROWS[row], f"{ROWS[row]}, percentage points over vanilla: {said}.",
              plot, legend=list(names.values()))
