"""A stand-in of ImageNet through training, a kill, resume and evaluation, with B0 at 224 pixels."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import standin_imagenet
from tests.conftest import ROOT

SETTINGS = {
    "data.name": "imagenet_folder", "data.test_split": "val", "data.batch_size": 8,
    "data.broken": "skip", "data.num_workers": 2, "train.accumulation": 1, "train.steps": 4,
    "train.log_every": 1, "model.dtype": "float32", "checkpoint.every_steps": 2,
    "eval.batch_size": 50, "eval.every_epochs": 0, "optimizer.learning_rate": 0.0005,
    "optimizer.warmup_epochs": 0}


@pytest.mark.slow
def test_b0_through_training_kill_resume_and_evaluation(tmp_path):
  """Fails where 1000 classes, odd JPEGs or broken ones stop a run, or an image is not counted."""
  standin_imagenet.make(tmp_path / "data", train=2, val=1, broken_files=3)
  command = [
      sys.executable, "-m", "advprop_jax.main", "--config=configs/imagenet_efficientnet.py:chips=1",
      f"--workdir={tmp_path / 'run'}", f"--config.data.dir={tmp_path / 'data'}",
      *(f"--config.{name}={value}" for name, value in SETTINGS.items())]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  fatal = subprocess.run([*command, "--config.data.broken=fatal"], cwd=ROOT, env=environment,
                         capture_output=True, text=True, check=False)
  assert fatal.returncode == 2
  assert "3 of 2003 files" in fatal.stderr

  first = subprocess.Popen(command, cwd=ROOT, env=environment)
  while not (tmp_path / "run/checkpoints/2").exists() and first.poll() is None:
    time.sleep(0.2)
  first.send_signal(signal.SIGKILL)
  first.wait()
  again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                         check=True)
  assert "those of the checkpoint of step" in again.stdout
  summary = json.loads((tmp_path / "run/summary.json").read_text())
  assert summary["step"] == 4
  assert {name: result["images"] for name, result in summary["results"].items()} == {
      "clean": 1000, "adversarial, main BN": 1000, "adversarial, auxiliary BN": 1000}
