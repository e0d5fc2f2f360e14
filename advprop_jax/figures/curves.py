"""Training curves: the mean over seeds, and one standard error to both sides."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from advprop_jax.figures.page import Section, listed
from advprop_jax.figures.runs import METRICS, Group, Metrics, average, read_metrics
from advprop_jax.figures.style import DASHES, Panel, draw, look

MOST_POINTS = 60        # of a curve: of more, neighbours are averaged
# Name of the file -> title, y axis, prefix or whole name of the metrics, factor.
PANELS = {
    "training_loss": ("Training loss of each domain", "cross entropy (nats)", "train/loss/", 1),
    "training_accuracy": ("Training accuracy of each domain", "top-1 of the batch (%)",
                          "train/accuracy/", 100),
    "test_accuracy": ("Clean test images", "top-1 (%)", "test/clean_top1", 100),
    "learning_rate": ("Learning rate", "learning rate", "train/learning_rate", 1),
    "images_per_second": ("Speed of training", "images / s", "train/images_per_second", 1),
}


@dataclasses.dataclass(frozen=True)
class Curve:
  """One metric of one group.

  Attributes:
    domain: behind the metric's prefix; "" for a metric that has none.
    steps: (n,).
    mean: (n,), over runs.
    error: (n,), standard error over runs; None of one run.
    binned: how many values each point is the mean of.
  """

  domain: str
  steps: np.ndarray
  mean: np.ndarray
  error: np.ndarray | None
  binned: int


def curves(metrics: Sequence[Metrics], prefix: str) -> list[Curve]:
  """The metrics of a group's runs that begin so, at the steps that all of them have."""
  names = [name for name in metrics[0] if name.startswith(prefix) and all(
      name in others for others in metrics)]
  result = []
  for name in sorted(names, key=lambda name: (not name.endswith("clean"), name)):
    steps = sorted(set.intersection(*(set(each[name]) for each in metrics)))
    if not steps:
      continue
    size = -(-len(steps) // MOST_POINTS)
    values = np.array([binned([each[name][step] for step in steps], size) for each in metrics])
    estimates = [average(list(column)) for column in values.T]
    error = None if len(metrics) == 1 else np.array([error for _, error in estimates])
    result.append(Curve(name.removeprefix(prefix), np.array(binned(steps, size)),
                        np.array([mean for mean, _ in estimates]), error, size))
  return result


def binned(values: Sequence[float], size: int) -> list[float]:
  """Means of so many neighbours; the last one perhaps of fewer."""
  return [float(np.mean(values[start:start + size])) for start in range(0, len(values), size)]


def section(groups: Sequence[Group], network: str = "") -> Section:
  """The figures of training; of the network named, if there are several."""
  title = f"Training{network and f': {network}'}"
  metrics = {group: [read_metrics(run.folder) for run in group.runs] for group in groups}
  panels, largest = [], 1
  for name, (heading, axis, prefix, factor) in PANELS.items():
    found = [(group, each) for group in groups if (each := curves(metrics[group], prefix))]
    if found:
      largest = max([largest, *(curve.binned for _, each in found for curve in each)])
      panels.append(_panel(name, heading, axis, factor, found, network))
  if not panels:
    return Section(title, [], reason=f"no run has a {METRICS} with a line that is whole; it is "
                   "written by --mode=train.")
  seeds = max(len(group.runs) for group in groups)
  smoothing = sorted({run.full_config.loss.label_smoothing for group in groups
                      for run in group.runs})
  caption = (
      "What training logged, by step (one update). Losses are those that train, with label "
      f"smoothing {' and '.join(f'{value:g}' for value in smoothing)}; training accuracies are of "
      "single batches, through the batch norms of the domain; test accuracy is that of the main "
      "batch norms, with moving averages of the weights where the run keeps them.")
  if seeds > 1:
    caption += " Lines are means over seeds, bands one standard error to both sides."
  if largest > 1:
    caption += f" A point is the mean of up to {largest} neighbouring log entries."
  caption += " Speed depends on the machine and on what else it did."
  without = [run.name for group in groups
             for run, own in zip(group.runs, metrics[group], strict=True) if not own]
  if without:
    caption += f" {listed(without)}: without {METRICS}."
  return Section(title, [caption], panels)


def _panel(name, title, axis, factor, found, network) -> Panel:
  def words(group, curve):
    return ", ".join(filter(None, (group.name, curve.domain.replace("_", " "))))

  def plot(axes):
    for place, (group, lines) in enumerate(found):
      style, behind = look(group), len(found) - 1 - place
      for number, curve in enumerate(lines):
        mean = factor * curve.mean
        every = max(len(mean) // 8, 1)
        # Where curves are equal, all can be seen: wider behind, and markers that take turns.
        axes.plot(curve.steps, mean, color=style.colour, marker=style.marker,
                  linestyle=DASHES[(number + group.place) % len(DASHES)], label=words(group, curve),
                  linewidth=1.4 + min(behind, 2),
                  markevery=(place * every // len(found), every),
                  markerfacecolor="white" if number else style.colour)
        if curve.error is not None:
          error = factor * curve.error
          axes.fill_between(curve.steps, mean - error, mean + error, color=style.colour,
                            alpha=0.18, linewidth=0)
    axes.set(xlabel="step", ylabel=axis)
    axes.set_xlim(left=0)
    if factor == 1 and name != "training_loss":
      axes.set_ylim(bottom=0)

  every = [(group, curve) for group, lines in found for curve in lines]
  ends = "; ".join(f"{words(group, curve)} ends at {factor * curve.mean[-1]:.3g}"
                   for group, curve in every)
  return draw(name + (network and f"_{network}"), title, f"{title}, {axis} by step: {ends}.", plot,
              legend=[words(*each) for each in every] if len(every) > 1 else ())

