"""What is read of workdirs is what they say, and nothing is averaged that must not be."""

import json
import math
import pathlib
import re

import pytest

from advprop_jax.errors import InputError
from advprop_jax.figures import runs
from advprop_jax.runtime.metrics import write_json
from tests.small_run import make_config

ATTACK = {"name": "pgd", "norm": "linf", "epsilon": 2.0, "step_size": 2.0, "num_steps": 1}


def row(top1, images=100, **more):
  """Of results, as an evaluation writes it."""
  return {"benchmark": "clean", "top1": top1, "top5": min(1.0, top1 + 0.1), "loss": 0.5,
          "ece": 0.02, "images": images, "standard_error": math.sqrt(top1 * (1 - top1) / images),
          "attack": None, **more}


def workdir(folder, scheme="advprop", seed=0, clean=0.8, results=None, changes=None, **more):
  """Writes the files of a run without checkpoint, and gives its path.

  `results` are further rows, `changes` fields of its config, `more` entries of summary.json.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  config = make_config({"scheme": scheme, "seed": seed, "data.image_size": 28,
                        "data.crop_fraction": 1.0, "model.input_convention": "inception",
                        **(changes or {})})
  write_json(folder / "config.json", config.to_dict())
  write_json(folder / "classes.json", {"names": [f"class {label}" for label in range(10)]})
  write_json(folder / "summary.json", {
      "scheme": scheme, "network": config.model.name, "seed": seed, "step": 2,
      "weights": "as trained", "data": "bundled, test[:12]", "attack": ATTACK,
      "results": {"clean": row(clean), **(results or {})}, "details": {}, "skipped": {}, **more})
  return str(folder)


def read(*folders):
  return runs.read_runs(folders[0], ",".join(folders[1:]) or None)


def test_several_workdirs_with_blanks(tmp_path):
  """Fails where a blank after a comma becomes part of a path, or the order is lost."""
  paths = [workdir(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
  found = runs.read_runs(paths[0], f" {paths[2]} ,{paths[1]},")
  assert [run.name for run in found] == ["a", "c", "b"]
  assert [run.facts["seed"] for run in found] == [0, 2, 1]


@pytest.mark.parametrize("others", ["{0}/nowhere", "{0}/empty", "{0}/bare", "{0}/a", "{0}/./a/",
                                    "{0}/link", "{0}/copy", "{0}/torn"])
def test_bad_workdirs_are_named(tmp_path, others):
  """Fails where such a workdir is left out without a word, counts twice, or ends in a traceback."""
  workdir(tmp_path / "a")
  workdir(tmp_path / "copy")
  workdir(tmp_path / "bare", seed=1, results={"clean": None})
  (pathlib.Path(workdir(tmp_path / "torn", seed=2)) / "config.json").write_text('{"seed"')
  (tmp_path / "empty").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "a")
  says = {"nowhere": "no such folder", "empty": "no run", "bare": "--mode=evaluate",
          "torn": "not whole"}
  path = others.format(tmp_path)
  expected = says.get(path.rsplit("/", 1)[-1], "same run")
  with pytest.raises(InputError, match=expected) as error:
    runs.read_runs(str(tmp_path / "a"), path)
  assert str(error.value).startswith(f"config.report.runs: '{path}'")
  assert "\n" not in str(error.value)


def test_the_first_run_is_named_by_its_flag(tmp_path):
  """Fails where a bad --workdir is said to be one of config.report.runs."""
  with pytest.raises(InputError, match=r"^--workdir=.*nowhere: there is no such folder"):
    runs.read_runs(str(tmp_path / "nowhere"), None)


def test_a_later_evaluation_wins_row_by_row(tmp_path):
  """Fails where a later evaluation of some benchmarks hides the rows of the training's end."""
  path = workdir(tmp_path / "a", results={"adversarial, main BN": row(0.3)},
                 skipped={"corruptions": "package missing", "imagenet_a": "other classes"})
  write_json(tmp_path / "a" / "evaluation.json", {
      "step": 2, "weights": "as trained", "data": "bundled, test[:12]", "scheme": "advprop",
      "network": "one_block", "seed": 0, "attack": ATTACK,
      "results": {"clean": row(0.9), "corruptions": row(0.5, benchmark="corruptions"),
                  "adversarial, main BN": None}})
  (run,) = read(path)
  tops = {name: each["top1"] for name, each in run.results.items()}
  assert tops == {"clean": 0.9, "adversarial, main BN": 0.3, "corruptions": 0.5}
  assert run.skipped == {"imagenet_a": "other classes"}
  assert run.notes == ()


@pytest.mark.parametrize(("change", "clean", "note"), [
    ({"data": "folder, fog/3"}, 0.8, "other images"),
    ({"step": 9}, 0.9, "those of evaluation.json .step 9"),
    ({"step": 1}, 0.8, "those of summary.json .step 2")])
def test_results_of_other_weights_or_images_do_not_mix(tmp_path, change, clean, note):
  """Fails where accuracy on fog, or of another checkpoint, stands in the row of clean images."""
  path = workdir(tmp_path / "a")
  write_json(tmp_path / "a" / "evaluation.json", {
      "step": 2, "weights": "as trained", "data": "bundled, test[:12]", "scheme": "advprop",
      "network": "one_block", "seed": 0, "results": {"clean": row(0.9)}, **change})
  (run,) = read(path)
  assert run.results["clean"]["top1"] == clean
  (said,) = run.notes
  assert re.search(note, said)


def test_old_results_are_read(tmp_path):
  """Fails where a summary.json without data, details, top-5 and standard error is refused."""
  path = pathlib.Path(workdir(tmp_path / "a"))
  saved = json.loads((path / "summary.json").read_text())
  for name in ("data", "details", "skipped"):
    del saved[name]
  saved["results"] = {"clean": {"top1": 0.8, "loss": 1.0, "images": 400}}
  write_json(path / "summary.json", saved)
  (run,) = read(str(path))
  assert run.facts["data"] == "bundled, test[:12]"
  assert runs.accuracy(run.results["clean"]) == (0.8, pytest.approx(0.02))


def test_seeds_are_averaged_and_nothing_else(tmp_path):
  """Fails where runs of another epsilon or scheme count as seeds, or eval settings part them."""
  paths = [workdir(tmp_path / "a0", clean=0.80), workdir(tmp_path / "v0", "vanilla", clean=0.70),
           workdir(tmp_path / "a1", seed=1, clean=0.84, changes={"eval.batch_size": 4}),
           workdir(tmp_path / "strong", clean=0.60, changes={"attack.epsilon": 8.0})]
  groups = runs.groups_of(read(*paths))
  assert [[run.name for run in group.runs] for group in groups] == [["a0", "a1"], ["v0"],
                                                                    ["strong"]]
  assert [group.label for group in groups] == ["AdvProp, attack.epsilon 4.0", "vanilla",
                                               "AdvProp, attack.epsilon 8.0"]
  assert [group.place for group in groups] == [0, 0, 1]
  (mean, error), number = runs.group_accuracy(groups[0], "clean")
  assert (mean, error, number) == (pytest.approx(0.82), pytest.approx(0.02), 2)
  (mean, error), number = runs.group_accuracy(groups[1], "clean")
  assert (mean, error, number) == (0.7, pytest.approx(math.sqrt(0.7 * 0.3 / 100)), 1)
  assert runs.group_accuracy(groups[1], "imagenet_a") is None


def test_what_was_measured_otherwise_is_not_averaged(tmp_path):
  """Fails where accuracies under attacks of different strength make one mean."""
  name = "adversarial, main BN"
  paths = [workdir(tmp_path / f"{seed}", seed=seed, results={
      name: row(0.5, attack={**ATTACK, "num_steps": 1 + seed})}) for seed in range(2)]
  (group,) = runs.groups_of(read(*paths))
  assert runs.group_accuracy(group, "clean")[1] == 2
  assert runs.group_accuracy(group, name) is None


def test_networks_are_drawn_apart(tmp_path):
  """Fails where figures of several networks share a name, or a single one is named in vain."""
  paths = [workdir(tmp_path / name, scheme, changes={"model.name": name.split("-")[0]})
           for scheme, name in (("advprop", "one_block"), ("advprop", "resnet_tiny"),
                                ("vanilla", "one_block-"))]
  groups = runs.groups_of(read(*paths))
  assert [group.label for group in groups] == ["AdvProp, one_block", "AdvProp, resnet_tiny",
                                               "vanilla, one_block"]
  apart = runs.by_network(groups)
  assert {network: [(group.name, group.place) for group in own]
          for network, own in apart.items()} == {
              "one_block": [("AdvProp", 0), ("vanilla", 0)], "resnet_tiny": [("AdvProp", 0)]}
  assert list(runs.by_network(groups[:1])) == [""]


def test_mean_and_standard_error():
  """Fails where the deviation is divided by n, or is given for the error of the mean."""
  assert runs.average([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
  assert runs.average([5.0]) == (5.0, None)


def test_equal_last_names_are_told_apart(tmp_path):
  """Fails where two runs have one name on the page, and so one network."""
  paths = [workdir(tmp_path / f"{seed}" / "run", seed=seed) for seed in range(3)]
  assert [run.name for run in read(*paths)] == ["run", "run (2)", "run (3)"]


def test_metrics_with_a_torn_line(tmp_path):
  """Fails where a null, or the half of a line, ends the report."""
  (tmp_path / "metrics.jsonl").write_text(
      '{"step": 1, "a": 2.0, "b": null}\n{"step": 2, "a": 3.0}\n[1]\n{"a": 9}\n{"step": 3, "a"')
  assert runs.read_metrics(str(tmp_path)) == {"a": {1: 2.0, 2: 3.0}}
  assert runs.read_metrics(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(("text", "expected"), [
    ("there is no checkpoint in '/tmp/some/run/checkpoints'; train",
     "there is no checkpoint in 'checkpoints'; train"),
    ("~/photos/test: not there", "test: not there"),
    ("/my data/set/train", "set/train"),
    ("bundled, fog/3; PGD-1 and/or 1/2", "bundled, fog/3; PGD-1 and/or 1/2")])
def test_no_folder_of_the_machine_is_told(text, expected):
  """Fails where a path stays whole, or a fraction or a split loses a part."""
  assert runs.without_folders(text, ["/my data/set"]) == expected
