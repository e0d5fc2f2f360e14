"""The tables of the page: runs, results, what is more to say of a benchmark, what was skipped."""

from collections.abc import Sequence

from advprop_jax.figures.page import Section, table
from advprop_jax.figures.robustness import SETS, attack_words
from advprop_jax.figures.runs import Group, Run, accuracy, attack_of, group_accuracy

DASH = "-"


def introduction(runs: Sequence[Run]) -> list[str]:
  """What the page is."""
  return [f"Figures of {len(runs)} run{'s' if len(runs) > 1 else ''}, made from the files in "
          "their workdirs alone: config.json, metrics.jsonl, summary.json, evaluation.json and the "
          "newest checkpoint. Each figure is beside this page as a PNG file too."]


def runs_section(runs: Sequence[Run]) -> Section:
  """Which runs these are."""
  facts = ("scheme", "network", "seed", "step", "weights", "data")
  rows = [[run.name, *(str(run.facts.get(fact, DASH)) for fact in facts)] for run in runs]
  notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
  header = ["run", "scheme", "network", "seed", "steps", "weights", "test images"]
  return Section("Runs", notes, body=table(header, rows, numbers=False))


def results_section(groups: Sequence[Group]) -> Section:
  """Top-1 of every row and run, and means over seeds; then all other numbers."""
  rows = row_names([run for group in groups for run in group.runs])
  body = table(*accuracy_table(groups, rows))
  body += ("<details><summary>Top-5, loss, calibration and attack of each result</summary>"
           + table(*all_numbers(groups, rows)) + "</details>")
  seeded = any(len(group.runs) > 1 for group in groups)
  caption = ("Top-1 in % ± one standard error"
             + (": of a single run over its images, of a mean over the seeds (runs)" if seeded
                else " over the images") + ". Adversarial images are made and classified through "
             "the batch norms named, by the attack named.")
  return Section("Results", [caption], body=body)


def row_names(runs: Sequence[Run]) -> list[str]:
  """Rows that any run has, in the order in which they first come."""
  return list(dict.fromkeys(name for run in runs for name, row in run.results.items() if row))


def accuracy_table(groups: Sequence[Group], rows: Sequence[str]
                   ) -> tuple[list[str], list[list[str]]]:
  """Header and rows: a column for the mean of each group of several runs, and one for each run."""
  header, runs = ["test images"], [run for group in groups for run in group.runs]
  header += [f"{group.label}\nmean of {len(group.runs)} seeds" for group in groups
             if len(group.runs) > 1]
  header += [f"{group.label}\n{run.name}" for group in groups for run in group.runs]
  lines = []
  for name in rows:
    said = {_conditions(name, run) for run in runs if run.results.get(name)}
    alike = len(said) == 1
    line = [name + (f"\n{next(iter(said))}" if alike else "")]
    for group in groups:
      if len(group.runs) > 1:
        found = group_accuracy(group, name)
        fewer = found and found[1] < len(group.runs)
        line.append(_percent(*found[0]) + (f"\n{found[1]} of {len(group.runs)} runs" if fewer
                                           else "") if found else DASH)
    for run in runs:
      row = run.results.get(name)
      line.append(DASH if not row else
                  _percent(*accuracy(row)) + ("" if alike else f"\n{_conditions(name, run)}"))
    lines.append(line)
  return header, lines


def all_numbers(groups: Sequence[Group], rows: Sequence[str]) -> tuple[list[str], list[list[str]]]:
  """Header and a row for each result of each run, with all that was recorded of it."""
  lines = []
  for name in rows:
    for run in (run for group in groups for run in group.runs):
      row = run.results.get(name)
      if row:
        lines.append([name, run.name, _percent(*accuracy(row)), _percent(row.get("top5"), None),
                      _number(row.get("loss")), _percent(row.get("ece"), None),
                      f"{row['images']:,}", _attack(name, run) or DASH])
  return ["test images", "run", "top-1 %", "top-5 %", "loss (nats)", "calibration error %",
          "images", "attack"], lines


def details(runs: Sequence[Run]) -> list[Section]:
  """mCE and the like of corrupted images, and what was skipped; each only if there is any."""
  sections = []
  rows = [[run.name, images, _percent(found["mean_error"], found.get("standard_error")),
           _number(found.get("mce"), 2), _number(found.get("relative_mce"), 2),
           f"{found['images']:,}",
           "; ".join(filter(None, (found.get("note"), _missing(found.get("missing")))))]
          for kind, images in SETS.items() for run in runs if (found := run.details.get(kind))]
  if rows:
    sections.append(Section(
        "Corrupted images in numbers",
        ["Mean top-1 error over 15 corruptions at 5 severities; mCE divides by AlexNet's errors, "
         "and is published for ImageNet-C's own files alone."],
        body=table(["run", "images", "mean error %", "mCE", "relative mCE", "of each setting",
                    "note"], rows, numbers=False)))
  skipped: dict[tuple[str, str], list[str]] = {}
  for run in runs:
    for reason in run.skipped.items():
      skipped.setdefault(reason, []).append(run.name)
  if skipped:
    sections.append(Section("Not measured", ["Benchmarks that an evaluation left out, and why."],
                            body=table(["benchmark", "reason", "runs"], [
                                [*reason, ", ".join(names)] for reason, names in skipped.items()],
                                       numbers=False)))
  return sections


def _conditions(name: str, run: Run) -> str:
  return ", ".join(filter(None, (f"{run.results[name]['images']:,} images", _attack(name, run))))


def _attack(name: str, run: Run) -> str:
  """Of a row, "" for none."""
  attack, restarts = attack_of(run, name), run.results[name].get("restarts", 1)
  words = attack_words(attack) if attack else ""
  return f"{words}, strongest of {restarts}" if words and restarts > 1 else words


def _percent(value: float | None, error: float | None) -> str:
  if value is None:
    return DASH
  return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")


def _number(value: float | None, digits: int = 4) -> str:
  return DASH if value is None else f"{value:.{digits}f}"


def _missing(names: Sequence[str] | None) -> str:
  return f"missing: {', '.join(names)}" if names else ""
