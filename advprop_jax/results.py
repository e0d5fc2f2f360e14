"""The table of an evaluation: for people, as CSV, and the paper's columns beside its numbers."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from advprop_jax.benchmarks import published
from advprop_jax.method.attack import Attack
from advprop_jax.runtime.metrics import table

COLUMNS = ("top1", "standard_error", "top5", "loss", "ece", "images")
PAPER = {"clean": "top-1 %", "imagenet_c": "mCE", "imagenet_a": "ImageNet-A %",
         "stylized_imagenet": "Stylized %"}


def results_table(summary: Mapping[str, Any]) -> str:
  """The results of a summary as plain text: a row for each set of images, and what was skipped."""
  known = published.of(summary)
  rows = []
  for name, result in summary["results"].items():
    percent = [None if result is None or result.get(column) is None
               else f"{100 * result[column]:.2f}" for column in ("top1", "standard_error", "top5")]
    rest = [None, None, None] if result is None else [
        f"{result['loss']:.4f}",
        None if result.get("ece") is None else f"{100 * result['ece']:.2f}", result["images"]]
    numbers = [*percent, *rest]
    rows.append([described(name, result, summary), *numbers, *([known.get(name)] if known else [])])
  header = ["test images", "top-1 %", "+-", "top-5 %", "loss", "ECE %", "images",
            *(["published"] if known else [])]
  lines = [table(rows, header)]
  lines += [f"\n{text}" for text in (*_details(summary), paper_table(summary)) if text]
  for name, reason in summary.get("skipped", {}).items():
    lines.append(f"\nskipped: {name}: {reason}")
  return "\n".join(lines)


def described(name: str, result: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> str:
  """The name of a row with its attack."""
  # Results of before each row said its attack had one attack for all.
  attack = (summary["attack"] if name.startswith("adversarial") else None) if (
      result is None or "attack" not in result) else result["attack"]
  if attack is None:
    return name
  restarts = (result or {}).get("restarts", 1)
  return f"{name} ({Attack(**attack)}{f', {restarts} starts' if restarts > 1 else ''})"


def paper_table(summary: Mapping[str, Any]) -> str:
  """The paper's columns, ours above what is published; empty where there is nothing of both."""
  known, results = published.of(summary), summary["results"]
  if not known:
    return ""
  details = summary.get("details", {})

  def ours(name):
    if name == "imagenet_c":
      value = details.get(name, {}).get("mce")
    else:
      value = results.get(name) and 100 * results[name]["top1"]
    return None if value is None else f"{value:.2f}"

  rows = [[summary["network"] + ", here", *map(ours, PAPER)],
          [f"published, {published.scheme_of(summary)}", *map(known.get, PAPER)]]
  return table(rows, ["the paper's columns", *PAPER.values()]) + "\n" + published.SOURCES


def _details(summary: Mapping[str, Any]) -> Iterator[str]:
  """Error by corruption and severity, and what follows from it."""
  for name, detail in summary.get("details", {}).items():
    if not detail.get("errors"):
      continue
    severities = [str(number) for number in range(1, 6)]
    rows = []
    for corruption, errors in detail["errors"].items():
      values = [errors.get(key, errors.get(int(key))) for key in severities]
      mean = None if None in values else sum(values) / len(values)
      rows.append([corruption, *(None if value is None else f"{100 * value:.1f}"
                                 for value in (*values, mean))])
    text = table(rows, [f"{name}: top-1 error %", *severities, "mean"])
    facts = [f"{label} {detail[key]:.2f}" for label, key in (("mCE", "mce"),
                                                             ("relative mCE", "relative_mce"))
             if detail.get(key) is not None]
    facts += [detail["note"]] if detail.get("note") else []
    yield text + (f"\n{name}: {', '.join(facts)}" if facts else "")


def results_csv(summary: Mapping[str, Any]) -> str:
  """Rows of (row, set, attack, columns): each row of the table, and each of the sets in it."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["row", "set", "attack", "restarts", *COLUMNS, "mce", "relative_mce",
                   "published"])
  known, details = published.of(summary), summary.get("details", {})
  for name, result in summary["results"].items():
    if result is None:
      continue
    detail = details.get(name, {})
    attack = "" if result.get("attack") is None else str(Attack(**result["attack"]))
    restarts = result.get("restarts", 1)
    writer.writerow([name, "", attack, restarts, *(result.get(column) for column in COLUMNS),
                     detail.get("mce"), detail.get("relative_mce"), known.get(name)])
    sets = result.get("sets", {})
    for set_name, values in (sets.items() if len(sets) > 1 else ()):
      numbers = [values[column] for column in COLUMNS]
      writer.writerow([name, set_name, attack, restarts, *numbers, "", "", ""])
  return file.getvalue()
