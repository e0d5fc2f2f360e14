"""Curves are those of the log."""

import json

import numpy as np

from advprop_jax.figures import curves, runs
from tests.figures.test_runs import read, workdir


def test_mean_and_error_at_common_steps():
  """Fails where seeds are averaged by place in place of step, or the band is not that of a mean."""
  one = {"train/loss/clean": {10: 1.0, 20: 2.0, 30: 9.0}, "train/loss": {10: 5.0}}
  two = {"train/loss/clean": {20: 4.0, 10: 1.0}, "train/loss/adversarial": {10: 1.0}}
  (curve,) = curves.curves([one, two], "train/loss/")
  assert (curve.domain, curve.binned) == ("clean", 1)
  np.testing.assert_allclose(curve.steps, [10, 20])
  np.testing.assert_allclose(curve.mean, [1, 3])
  np.testing.assert_allclose(curve.error, [0, 1])


def test_the_clean_domain_comes_first():
  """Fails where the line of the adversarial domain is the one that is drawn as the main one."""
  metrics = {f"train/loss/{name}": {1: 0.0} for name in ("adversarial", "autoaugment", "clean")}
  found = curves.curves([metrics], "train/loss/")
  assert [curve.domain for curve in found] == ["clean", "adversarial", "autoaugment"]
  assert found[0].error is None


def test_long_logs_are_averaged():
  """Fails where values of a long log are dropped in place of averaged."""
  values = {step: float(step % 2) for step in range(1, 181)}
  (curve,) = curves.curves([{"train/loss/clean": values}], "train/loss/")
  assert (len(curve.steps), curve.binned) == (60, 3)
  np.testing.assert_allclose(curve.steps[:2], [2, 5])
  np.testing.assert_allclose(curve.mean[:2], [2 / 3, 1 / 3])
  assert curves.binned([1, 2, 3, 4, 8], 2) == [1.5, 3.5, 8.0]


def test_panels_and_what_is_missing(tmp_path):
  """Fails where a run without a log is drawn as one, or hides the others."""
  paths = [workdir(tmp_path / "a"), workdir(tmp_path / "v", "vanilla")]
  (group, other) = runs.groups_of(read(*paths))
  assert "metrics.jsonl" in curves.section([group, other]).reason
  lines = [{"step": 5, "train/loss/clean": 1.5, "train/learning_rate": 0.1},
           {"step": 9, "train/loss/clean": 1.25, "test/clean_top1": 0.5}]
  (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  section = curves.section([group, other])
  assert [panel.name for panel in section.panels] == ["training_loss", "test_accuracy",
                                                      "learning_rate"]
  assert "AdvProp, clean ends at 1.25" in section.panels[0].alt
  assert "ends at 50" in section.panels[1].alt
  assert "v: without metrics.jsonl" in section.captions[0]
