"""The table says what the summary holds, and what is published beside it."""

import csv
import io

from advprop_jax.results import paper_table, results_csv, results_table

ATTACK = {"name": "pgd", "norm": "linf", "epsilon": 2.0, "step_size": 1.0, "num_steps": 3,
          "clean_start": 0.0, "ball": True, "statistics": "running", "target": "none",
          "dropout": False, "label_smoothing": 0.0, "ramp_steps": 0}


def row(top1, **more):
  values = {"top1": top1, "top5": 0.9, "loss": 1.25, "ece": 0.0375, "images": 400,
            "standard_error": 0.0125}
  return {"benchmark": "clean", **values, "attack": None, "restarts": 1,
          "sets": {"a": values, "b": values}, **more}


def summary(**changes):
  return {"network": "efficientnet_b0", "scheme": None, "seed": None, "step": 0, "imagenet": True,
          "imagenet_validation": True, "weights": "timm/tf_efficientnet_b0.ap_in1k",
          "attack": ATTACK,
          "results": {"clean": row(0.7712), "adversarial, main BN": row(0.25, attack=ATTACK,
                                                                       restarts=5),
                      "imagenet_a": row(0.0531), "imagenet_c": row(0.4)},
          "details": {"imagenet_c": {"errors": {"fog": {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.75}},
                                     "mce": 66.5, "relative_mce": 90.25, "note": ""}},
          "skipped": {"imagenet_r": "there is no folder"}, **changes}


def cells(text, begins):
  (line,) = [line for line in text.splitlines() if line.startswith(begins)]
  return line.removeprefix(begins).split()


def test_rows_of_the_table():
  """Fails where a column holds another number, or a row lacks its attack or what is published."""
  text = results_table(summary())
  assert cells(text, "clean ") == ["77.12", "1.25", "90.00", "1.2500", "3.75", "400", "77.6"]
  attacked = "adversarial, main BN (PGD-3, epsilon 2, step 1, 5 starts)"
  assert cells(text, attacked) == ["25.00", "1.25", "90.00", "1.2500", "3.75", "400", "-"]
  assert cells(text, "imagenet_a ")[-1] == "5.307"
  assert cells(text, "fog ") == ["25.0", "50.0", "50.0", "50.0", "75.0", "50.0"]
  assert "imagenet_c: mCE 66.50, relative mCE 90.25" in text
  assert "skipped: imagenet_r: there is no folder" in text


def test_the_papers_columns():
  """Fails where ours and the published number of a column are not of the same thing."""
  text = paper_table(summary())
  assert cells(text, "efficientnet_b0, here") == ["77.12", "66.50", "5.31", "-"]
  assert cells(text, "published, advprop") == ["77.6", "~66.2", "5.307", "~14.6"]
  vanilla = paper_table(summary(scheme="vanilla", step=100, weights="moving averages"))
  assert cells(vanilla, "published, vanilla") == ["77.1", "~70.7", "~6.7", "~13.1"]
  assert paper_table(summary(imagenet=False)) == ""
  assert "published" not in results_table(summary(imagenet=False))


def test_a_summary_of_before():
  """Fails where results without top-5, errors and attacks of their own cannot be shown."""
  old = {"network": "one_block", "scheme": "vanilla", "step": 2, "weights": "as trained",
         "attack": ATTACK, "results": {
             "clean": {"top1": 0.5, "loss": 1.0, "images": 10},
             "adversarial, main BN": {"top1": 0.25, "loss": 2.0, "images": 10},
             "adversarial, auxiliary BN": None}}
  text = results_table(old)
  assert cells(text, "clean ") == ["50.00", "-", "-", "1.0000", "-", "10"]
  assert cells(text, "adversarial, auxiliary BN (PGD-3, epsilon 2, step 1)") == ["-"] * 6


def test_csv_has_rows_and_their_sets():
  lines = list(csv.DictReader(io.StringIO(results_csv(summary()))))
  assert len(lines) == 4 * 3
  (c,) = [line for line in lines if line["row"] == "imagenet_c" and not line["set"]]
  assert (c["mce"], c["relative_mce"], c["published"]) == ("66.5", "90.25", "~66.2")
  (part,) = [line for line in lines if (line["row"], line["set"]) == ("clean", "b")]
  assert (part["top1"], part["standard_error"], part["images"]) == ("0.7712", "0.0125", "400")
  assert [line["restarts"] for line in lines if line["row"].startswith("adv")] == ["5"] * 3
