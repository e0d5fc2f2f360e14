"""An evaluation that is killed goes on where it was, with a real process and a real SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

FLAGS = ["--mode=evaluate", "--config=configs/quickstart.py:scheme=vanilla",
         "--config.data.test_split=test[:100]", "--config.eval.batch_size=10",
         "--config.eval.benchmarks=clean,corruptions", "--config.eval.corrupted_images=40",
         "--config.model.name=one_block", "--config.eval.num_workers=1"]
# As `python -m tests.one_block`, but what is known is written after each batch.
PROGRAM = ("from tests import one_block; from advprop_jax import main, measure; "
           "measure.SECONDS_BETWEEN_SAVES = 0.0; one_block.register(); main.run()")


@pytest.mark.slow
def test_killed_three_times(run_of_one_block, tmp_path):
  """Fails where a kill loses what was measured, counts an image twice, or changes a number."""
  pytest.importorskip("imagecorruptions")

  def command(workdir):
    return [sys.executable, "-c", PROGRAM, f"--workdir={workdir}", *FLAGS, *run_of_one_block]

  settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  whole = subprocess.run(command(tmp_path / "whole"), check=False, **settings)
  assert whole.returncode == 0, whole.stdout
  kept = tmp_path / "killed/evaluation_partial/corruptions.npz"
  for _ in range(3):
    before = kept.stat().st_mtime_ns if kept.exists() else 0
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and (not kept.exists() or kept.stat().st_mtime_ns == before):
      time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert kept.exists()
  last = subprocess.run(command(tmp_path / "killed"), check=False, **settings)
  assert last.returncode == 0, last.stdout
  assert "corruptions: goes on after" in last.stdout
  assert not kept.parent.exists()

  def numbers(folder):
    summary = json.loads((tmp_path / folder / "evaluation.json").read_text())
    return summary["results"], summary["details"]

  assert numbers("killed") == numbers("whole")


@pytest.fixture
def run_of_one_block(published):
  """Flags of weights to evaluate."""
  return [f"--config.model.pretrained={published()}", "--config.model.input_convention=inception"]
