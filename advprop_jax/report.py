"""Workdirs as figures: one page that holds everything, and the same figures as files beside it."""

import dataclasses
import os
import shlex
import time
from collections.abc import Sequence

import jax
import ml_collections

from advprop_jax import trained
from advprop_jax.errors import InputError, of_disk
from advprop_jax.figures import bank, curves, gain, images, robustness, tables
from advprop_jax.figures.page import PROGRAM, Section, render
from advprop_jax.figures.runs import Run, by_network, folders, groups_of, read_runs, without_folders
from advprop_jax.trained import TrainedNetwork

FOLDER, PAGE = "report", "index.html"
TITLE = "AdvProp: a report of runs"


def report(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Writes WORKDIR/report/: the page, and each of its figures as a PNG.

  Args:
    config: `config.report.runs` names other workdirs; all else is taken from the runs themselves.
    workdir: of the first run.

  Returns:
    {"page": its path, "figures": [file names], "left_out": {section: why}, "runs": [names],
    "seconds": it took}.

  Raises:
    InputError: a run that cannot be reported on, or the folder cannot be written.
  """
  start = time.perf_counter()
  runs = read_runs(workdir, config.report.runs)
  sections = make_sections(runs)
  others = ",".join(run.name for run in runs[1:])
  command = (f"{PROGRAM} --mode=report --config=configs/quickstart.py "
             f"--workdir={shlex.quote(runs[0].name)}"
             + (f" --config.report.runs={shlex.quote(others)}" if others else ""))
  page = render(TITLE, tables.introduction(runs), sections, command)
  panels = [panel for section in sections for panel in section.panels]
  result = {"page": os.path.join(workdir, FOLDER, PAGE),
            "figures": [f"{panel.name}.png" for panel in panels],
            "left_out": {section.title: section.reason for section in sections if section.reason},
            "runs": [run.name for run in runs]}
  if jax.process_index() == 0:
    write(os.path.join(workdir, FOLDER), page, panels)
    for title, reason in result["left_out"].items():
      print(f"left out: {title}: {reason}")
  result["seconds"] = round(time.perf_counter() - start, 1)
  if jax.process_index() == 0:
    print(f"{PAGE} and {len(panels)} figures are in {os.path.join(workdir, FOLDER)}, "
          f"{result['seconds']:.0f} s")
  return result


def make_sections(runs: Sequence[Run]) -> list[Section]:
  """All parts of the page, in their order; of one that cannot be made, the reason."""
  groups = groups_of(runs)
  shown = {group.first.name for group in images.shown(groups)}
  networks = {run.name: read_network(run) for group in groups for run in group.runs
              if run.name in shown or bank.has_bank(group)}
  made = [tables.runs_section(runs), tables.results_section(groups), *tables.details(runs)]
  kinds = by_network(groups)
  made += [curves.section(own, network) for network, own in kinds.items()]
  made += [section for network, own in kinds.items()
           for section in robustness.sections(own, network)]
  made.append(gain.section(groups))
  made += [bank.section(own, networks, network) for network, own in kinds.items()]
  made += images.sections(groups, networks)
  return [without_paths(section, runs) for section in made]


def read_network(run: Run) -> TrainedNetwork | str:
  """The network of a run's newest checkpoint, or why it cannot be read."""
  try:
    return trained.read_run(run.folder)
  except InputError as error:
    return str(error)


def without_paths(section: Section, runs: Sequence[Run]) -> Section:
  """The part without folders of this machine, which messages may name."""
  known = [folder for run in runs for folder in folders(run.folder, run.config)]
  return dataclasses.replace(
      section, captions=[without_folders(text, known) for text in section.captions],
      reason=section.reason and without_folders(section.reason, known))


def write(folder: str, page: str, panels: Sequence) -> None:
  """Writes the files, the page last; an InputError (a FaultError if it may pass) if not."""
  try:
    os.makedirs(folder, exist_ok=True)
    for panel in panels:
      with open(os.path.join(folder, f"{panel.name}.png"), "wb") as file:
        file.write(panel.png)
    with open(os.path.join(folder, PAGE), "w", encoding="utf-8") as file:
      file.write(page)
  except OSError as error:
    raise of_disk(error, f"--workdir={os.path.dirname(folder)}: the report cannot be written",
                  "let the folder be written") from error
