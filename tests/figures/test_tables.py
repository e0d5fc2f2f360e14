"""The tables say what was measured, and looks tell groups apart."""

import itertools

import pytest

from advprop_jax.figures import page, runs, style, tables
from tests.figures.test_runs import ATTACK, read, row, workdir

ADVERSARIAL = "adversarial, main BN"


def groups(tmp_path, *settings):
  paths = [workdir(tmp_path / str(place), **each) for place, each in enumerate(settings)]
  return runs.groups_of(read(*paths))


def test_results(tmp_path):
  """Fails where a mean is that of other runs, or its error that over images."""
  made = groups(tmp_path, {"seed": 0, "clean": 0.80, "results": {"imagenet_a": row(0.1)}},
                {"seed": 1, "clean": 0.84}, {"scheme": "vanilla", "clean": 0.5})
  header, lines = tables.accuracy_table(made, ["clean", "imagenet_a"])
  assert header == ["test images", "AdvProp\nmean of 2 seeds", "AdvProp\n0", "AdvProp\n1",
                    "vanilla\n2"]
  assert lines[0] == ["clean\n100 images", "82.00 ± 2.00", "80.00 ± 4.00", "84.00 ± 3.67",
                      "50.00 ± 5.00"]
  assert lines[1][1:] == ["10.00 ± 3.00\n1 of 2 runs", "10.00 ± 3.00", "-", "-"]


def test_attacks_stand_where_they_differ(tmp_path):
  """Fails where two strengths of attack share a row and one of them is named."""
  made = groups(tmp_path, {"results": {ADVERSARIAL: row(0.5, attack=ATTACK)}},
                {"scheme": "vanilla", "results": {
                    ADVERSARIAL: row(0.5, attack={**ATTACK, "num_steps": 9}, restarts=3)}})
  (line,) = tables.accuracy_table(made, [ADVERSARIAL])[1]
  assert line[0] == ADVERSARIAL
  assert line[1].endswith("PGD-1, epsilon 2, step 2")
  assert line[2].endswith("PGD-9, epsilon 2, step 2, strongest of 3")


def test_rows_that_no_run_has(tmp_path):
  """Fails where a vanilla pair has an empty row of auxiliary batch norms."""
  made = groups(tmp_path, {"results": {"adversarial, auxiliary BN": None}})
  assert tables.row_names([made[0].first]) == ["clean"]


def test_details_and_what_was_skipped(tmp_path):
  """Fails where an mCE is lost, or one reason of many runs fills the page."""
  found = {"errors": {}, "mean_error": 0.25, "standard_error": 0.01, "mce": 76.7,
           "relative_mce": None, "images": 50, "note": "by others", "missing": ["fog/3"]}
  made = groups(tmp_path, *({"seed": seed, "skipped": {"imagenet_a": "other classes"},
                             "details": {"imagenet_c": found}} for seed in range(2)))
  numbers, skipped = tables.details(made[0].runs)
  for text in ("25.00 ± 1.00", "76.70", "by others; missing: fog/3"):
    assert numbers.body.count(text) == 2
  assert skipped.body.count("other classes") == 1
  assert "0, 1" in skipped.body


def test_groups_can_be_told_apart_without_colours(tmp_path):
  """Fails where two groups of a page have the same marker and hatch."""
  schemes = ("vanilla", "advprop", "joint", "adversarial", "fast_advprop")
  made = groups(tmp_path, *({"scheme": scheme, "changes": {
      "train.steps": steps, **({"attack.statistics": "batch", "attack.dropout": True}
                               if scheme == "fast_advprop" else {})}}
      for scheme, steps in itertools.product(schemes, (2, 3))))
  looks = [style.look(group) for group in made]
  assert len({(look.marker, look.dash, look.colour) for look in looks}) == len(looks)
  assert len({look.hatch for look in looks}) == len(looks)
  assert len({look.colour for look in looks}) == len(schemes)


@pytest.mark.parametrize(("words", "said"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"),
                                             (["a", "b", "c"], "a, b and c")])
def test_listed(words, said):
  assert page.listed(words) == said


def test_text_is_escaped_and_commands_are_code(tmp_path):
  """Fails where the name of a run becomes HTML, or a command takes the full stop with it."""
  path = workdir(tmp_path / "<b>")
  (run,) = read(path)
  text = page.paragraph(f"No; {page.evaluate_command(run, 'clean,strength')}.")
  assert "<b>" not in text
  assert text.endswith("<span>--config.eval.benchmarks=clean,strength</span></code>.</p>")
  assert "<span>--workdir=&#x27;&lt;b&gt;&#x27;</span> <span>" in text
  assert "&lt;b&gt;" in page.table(["a"], [["<b>"]])
