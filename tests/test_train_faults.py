"""What a training does about a loss that is no number, and a disk that is full."""

import errno
import json
import re
import signal

import jax
import numpy as np
import pytest

from advprop_jax import measure, train
from advprop_jax.errors import InputError
from advprop_jax.runtime import checkpoint
from advprop_jax.runtime.faults import Preempted
from tests import pods
from tests.pods import lines, newest
from tests.small_run import make_config

STEPS = 8


def config_of(changes=None):
  return make_config({"train.steps": STEPS, "checkpoint.every_steps": 2, "train.log_every": 1,
                      "eval.every_epochs": 0.0, "eval.benchmarks": "clean", **(changes or {})})


@pytest.fixture
def bad_batches(monkeypatch):
  """A set; batches of these numbers, from 1, have a loss that is no number."""
  bad, real = set(), train.require_finite

  def require_finite(step, metrics, batches):
    real(step, {**metrics, "loss": float("nan")} if batches in bad else metrics, batches)

  monkeypatch.setattr(train, "require_finite", require_finite)
  return bad


def same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def without(monkeypatch, left_out):
  """Makes the stream of training batches one without these numbers."""
  real = train.loader.TrainingBatches.__next__

  def following(self):
    batch = real(self)
    return following(self) if self.get_state()["batches"] in left_out else batch

  monkeypatch.setattr(train.loader.TrainingBatches, "__next__", following)


@pytest.mark.parametrize(("bad", "left_out"), [
    pytest.param({6}, {5, 6}, marks=pytest.mark.slow),
    pytest.param({1}, {1}, marks=pytest.mark.slow), ({3, 8}, {3, 8}), ({7, 8}, {5, 6, 7, 8})])
def test_bad_batches_are_skipped(bad_batches, monkeypatch, tmp_path, capsys, bad, left_out):
  """Back to the newest checkpoint, past the bad batch: the run whose data has no such batches.

  Two in a row behind a checkpoint: back to the one before it. Fails where a step is lost or logged
  twice, where the bad batch comes again, or where the state is not the checkpoint's.
  """
  bad_batches |= bad
  train.train(config_of({"train.max_skips": 2}), str(tmp_path / "skipping"))
  warnings = [line for line in capsys.readouterr().err.splitlines() if "Warning" in line]
  assert len(warnings) == len(bad)
  assert "the loss is not finite" in warnings[0]
  assert "(1 of at most 2 times)" in warnings[0]
  saved = newest(tmp_path / "skipping")
  assert saved.iterator == {"batches": STEPS + len(left_out), "skips": len(bad)}
  assert [line["step"] for line in lines(tmp_path / "skipping") if "train/loss" in line] == list(
      range(1, STEPS + 1))
  bad_batches.clear()
  without(monkeypatch, left_out)
  train.train(config_of(), str(tmp_path / "reference"))
  same_bits(saved.state, newest(tmp_path / "reference").state)


def test_it_goes_back_no_more_than_it_may(bad_batches, tmp_path):
  """Nor after a restart: what was done before counts."""
  bad_batches |= {3, 7}
  with pytest.raises(InputError, match=r"step 6: the loss is not finite .*config.train.max_skips"):
    train.train(config_of({"train.max_skips": 1}), str(tmp_path))
  assert newest(tmp_path).step == 4
  assert newest(tmp_path).iterator == {"batches": 5, "skips": 1}
  with pytest.raises(InputError, match="step 6: the loss is not finite"):
    train.train(config_of({"train.max_skips": 1}), str(tmp_path))


def test_by_default_it_stops(bad_batches, tmp_path):
  bad_batches |= {5}
  with pytest.raises(InputError, match="step 5: the loss is not finite"):
    train.train(config_of(), str(tmp_path))
  assert newest(tmp_path).step == 4


def test_a_signal_during_an_evaluation_saves_the_step_before_it(monkeypatch, tmp_path):
  """Fails where it waits for the end of the evaluation, or loses the steps before it."""
  signals, real = [signal.SIGTERM], measure.Measurer.answers

  def answers(*args, **settings):
    if signals:
      signal.raise_signal(signals.pop())
    return real(*args, **settings)

  monkeypatch.setattr(measure.Measurer, "answers", answers)
  config = config_of({"eval.every_epochs": 1.5, "checkpoint.every_steps": 100})   # 2 steps each
  with pytest.raises(Preempted, match=f"Stopped after step 3 of {STEPS}, whose checkpoint is"):
    train.train(config, str(tmp_path))
  assert newest(tmp_path).step == 3
  train.train(config, str(tmp_path))
  assert [line["step"] for line in lines(tmp_path) if "test/clean_top1" in line] == [6, 8]
  assert [line["step"] for line in lines(tmp_path) if "train/loss" in line] == list(
      range(1, STEPS + 1))


def test_a_signal_from_outside_saves_and_ends_well(tmp_path):
  """Fails where the program, not `train`, does not hear it, or ends with another code or word."""
  command = pods.single(tmp_path / "run", "--config.train.steps=1000", module="tests.slowly")
  program = pods.start(command, tmp_path / "cache")
  pods.wait_for_step(program, tmp_path / "run", 2)
  program.send_signal(signal.SIGTERM)
  said = re.search(r"Stopped after step (\d+) of 1000, whose checkpoint is written; resume with "
                   "the same command", pods.finish(program, code=0, seconds=60))
  assert pods.newest(tmp_path / "run").step == int(said[1])


@pytest.fixture
def full_disk(monkeypatch):
  """A set; the checkpoints of these steps are being written when the disk is full."""
  full, real = set(), checkpoint.write_manifest

  def write_manifest(directory):
    if int(directory.name.split(".")[0]) in full:
      raise OSError(errno.ENOSPC, "No space left on device")
    real(directory)

  monkeypatch.setattr(checkpoint, "write_manifest", write_manifest)
  return full


def test_a_full_disk_stops_the_training_and_earlier_checkpoints_stay(full_disk, tmp_path):
  full_disk |= {4}
  with pytest.raises(InputError, match=r"The checkpoint of step 4 could not be written to .* \(No "
                     r"space left on device\); free some space .*whole checkpoints there: 2"):
    train.train(config_of(), str(tmp_path))
  assert newest(tmp_path).step == 2
  full_disk.clear()
  train.train(config_of(), str(tmp_path))              # the same command, with some space
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_or_the_training_goes_on(full_disk, tmp_path, capsys, step):
  """The later checkpoints are there, and the numbers are those of a run without the fault.

  The one of step 6 is known to have failed when the last one is saved.
  """
  full_disk |= {step}
  changes = {"checkpoint.on_failure": "continue", "checkpoint.keep": 5}
  train.train(config_of(changes), str(tmp_path / "full"))
  warnings = [line for line in capsys.readouterr().err.splitlines() if "Warning" in line]
  assert len(warnings) == 1
  assert f"The checkpoint of step {step} could not be written" in warnings[0]
  assert sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir()) == [
      other for other in ("2", "4", "6", "8") if other != str(step)]
  full_disk.clear()
  train.train(config_of(changes), str(tmp_path / "room"))
  same_bits(newest(tmp_path / "full").state, newest(tmp_path / "room").state)


def test_the_last_checkpoint_is_never_lost_silently(full_disk, tmp_path):
  full_disk |= {STEPS}
  with pytest.raises(InputError, match=f"The checkpoint of step {STEPS} could not be written"):
    train.train(config_of({"checkpoint.on_failure": "continue"}), str(tmp_path))


def test_an_interrupted_save_is_no_checkpoint(tmp_path):
  """All files, but not the name that a whole one has: it is made again."""
  train.train(config_of(), str(tmp_path))
  done = newest(tmp_path).state
  folder = tmp_path / "checkpoints"
  (folder / "8").rename(folder / "8.orbax-checkpoint-tmp")
  assert newest(tmp_path).step == 6
  summary = train.train(config_of(), str(tmp_path))
  assert summary["training"]["start_step"] == 6
  assert json.loads((tmp_path / "summary.json").read_text())["step"] == STEPS
  same_bits(newest(tmp_path).state, done)
