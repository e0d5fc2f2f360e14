"""Pods of two processes on this machine: the numbers of one process, before and after a restart."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from advprop_jax.experiment import fresh_state
from advprop_jax.runtime.parallel import hurried
from launch import local_pod as launcher
from tests import pods
from tests.conftest import ROOT
from tests.pods import local_pod, newest, run, single

STEPS = 60
LENGTH = [f"--config.train.steps={STEPS}", "--config.checkpoint.every_steps=20"]
SYNCED = "--config.model.bn_group_size=4"
PARTS = ("params", "batch_stats", "opt_state", "ema")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pod(cache, tmp_path_factory):
  """A run of two processes with two devices each."""
  workdir = tmp_path_factory.mktemp("pod")
  return workdir, run(local_pod(2, 2, workdir, *LENGTH, SYNCED), cache)


def largest_difference(a, b):
  """Of all numbers of two states, the steps' included."""
  assert int(a.step) == int(b.step)
  leaves = [jax.tree.leaves([getattr(state, part) for part in PARTS]) for state in (a, b)]
  largest = max(float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
                for x, y in zip(*leaves, strict=True))
  print(f"largest difference: {largest:.2g}")
  return largest


def test_two_processes_are_four_devices_are_one(pod, cache, tmp_path):
  """Fails where shards overlap, gradients are summed over one process alone, images of the test are
  counted twice, or not at all (103 of them in batches of 16), or the picture shows others.
  """
  workdir, _ = pod
  run(local_pod(1, 4, tmp_path / "four", *LENGTH, SYNCED), cache)
  run(single(tmp_path / "one", *LENGTH), cache)
  reference = newest(workdir)
  results = json.loads((workdir / "summary.json").read_text())["results"]["clean"]
  assert results["images"] == 103
  for name in ("four", "one"):
    other = newest(tmp_path / name)
    assert largest_difference(reference.state, other.state) < 2e-6
    assert other.iterator == reference.iterator
    theirs = json.loads((tmp_path / name / "summary.json").read_text())["results"]["clean"]
    np.testing.assert_allclose(results["loss"], theirs["loss"], rtol=1e-5)
    # An attack follows signs: a few pixels differ, and are amplified.
    picture, of_other = (np.asarray(Image.open(of / "adversarial.png")).astype(int)
                         for of in (workdir, tmp_path / name))
    assert np.mean(np.abs(picture - of_other) > 2) < 0.01
  assert largest_difference(reference.state, fresh_like(reference.state)) > 1e-3


@pytest.mark.slow
def test_the_quickstart_itself_differs_more(cache, tmp_path):
  """Its AdamW, its attack by the gradient's sign, and its network: README has the difference.

  Fails where the two ways part: where they differ by more than a part of what training moved.
  """
  own = ["--config.model.name=efficientnet_tiny", "--config.data.batch_size=64",
         "--config.optimizer.name=adamw", "--config.optimizer.schedule=cosine",
         "--config.optimizer.weight_decay_form=decoupled", "--config.attack.norm=linf",
         "--config.train.steps=12"]
  run(local_pod(2, 2, tmp_path / "pod", *own, SYNCED), cache)
  run(single(tmp_path / "one", *own), cache)
  states = [newest(tmp_path / "pod").state, newest(tmp_path / "one").state,
            hurried(lambda: fresh_state(pods.experiment_of(tmp_path / "one")))()]
  pod, one, begun = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
                     for state in states)
  differences, moved = np.abs(pod - one), np.abs(one - begun)
  print(f"parameters differ by at most {differences.max():.2g}, in the mean by "
        f"{differences.mean():.2g}; training has moved them by {moved.mean():.2g} in the mean")
  assert differences.mean() < 0.1 * moved.mean()


def fresh_like(state):
  """What has not been trained: the comparison would find it."""
  return jax.tree.map(lambda x: x if x.ndim == 0 else np.zeros_like(x), state)


def test_the_launcher_sees_the_end_of_any_process():
  """Fails where it looks no further than the first that runs."""
  processes = [subprocess.Popen([sys.executable, "-c", program])
               for program in ("import time; time.sleep(60)", "raise SystemExit(7)")]
  start = time.monotonic()
  assert launcher.watch(processes, grace=0.5) == 7
  assert time.monotonic() - start < 30


def test_paths_are_from_where_the_command_is_given(tmp_path, monkeypatch):
  """Fails where a relative workdir lands in the checkout, or nothing is found but from there."""
  (tmp_path / "where.py").write_text("import os, advprop_jax\n"
                                     "print(os.getcwd(), advprop_jax.__file__)\n")
  monkeypatch.chdir(tmp_path)
  flags, rest = launcher.parse(["--module=where", "--processes=1"])
  process, = launcher.start(flags, rest)
  said, _ = process.communicate(timeout=60)
  assert said.decode().split() == [str(tmp_path), str(ROOT / "advprop_jax" / "__init__.py")]


def test_one_process_writes_and_talks(pod):
  """Fails where metrics have a line of each process, or a table is printed by each."""
  workdir, output = pod
  steps = [line["step"] for line in pods.lines(workdir) if "train/loss" in line]
  assert steps == list(range(1, STEPS + 1))
  assert len(list((workdir / "tensorboard").iterdir())) == 1
  assert output.count("summary.json, summary.csv") == 1
  # Where a machine is slow, XLA's own log says so on any of them.
  others = [line for line in output.splitlines() if not line.startswith("[0] ")
            and not re.match(r"\[\d\] ([IWEF]\d{4} |WARNING: All log messages)", line)]
  assert not others, output
  assert json.loads((workdir / "summary.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 1])
def test_two_one_two_processes_over_one_run(pod, cache, tmp_path, devices):
  """SIGTERM, then another number of processes, twice: the numbers of the run that was left alone.

  Fails where a checkpoint is of a number of processes or devices, where the data does not go on
  where it was, or where the processes of a pod stop after different steps. `devices` are those of
  the one process.
  """
  workdir, at = tmp_path / "run", 0
  two = local_pod(2, 2, workdir, *LENGTH, SYNCED, module="tests.slowly")
  one = local_pod(1, devices, workdir, *LENGTH, f"--config.model.bn_group_size={devices}",
                  module="tests.slowly")
  for last, command in ((False, two), (False, one), (True, two)):
    program = pods.start(command, cache)
    if not last:
      pods.wait_for_step(program, workdir, at + 2)
      program.send_signal(signal.SIGTERM)
      output = pods.finish(program)
      assert "resume with the same command" in output
      saved = newest(workdir)
      assert saved.iterator["batches"] == saved.step >= at + 2
      assert f"Stopped after step {saved.step} of {STEPS}" in output
      at = saved.step
    else:
      pods.finish(program)
  assert newest(workdir).iterator == newest(pod[0]).iterator
  assert largest_difference(newest(workdir).state, newest(pod[0]).state) < 2e-6
  assert [line["step"] for line in pods.lines(workdir) if "train/loss" in line] == list(
      range(1, STEPS + 1))


@pytest.mark.slow
def test_one_process_that_is_told_stops_all_and_the_bits_are_the_same(pod, cache, tmp_path):
  """Stopped by SIGTERM to process 1 and started again, it is bit for bit the undisturbed run.

  So it is the test of determinism as well: two runs of the same seed and devices.
  """
  command = local_pod(2, 2, tmp_path, *LENGTH, SYNCED, module="tests.slowly")
  program = pods.start(command, cache)
  pods.wait_for_step(program, tmp_path, 3)
  os.kill(pods.children(program)[1], signal.SIGTERM)
  output = pods.finish(program)
  assert output.count("resume with the same command") == 2
  assert newest(tmp_path).step < STEPS
  run(command, cache)
  jax.tree.map(np.testing.assert_array_equal, newest(tmp_path).state, newest(pod[0]).state)


@pytest.mark.slow
def test_the_final_evaluation_is_stopped_on_all(cache, tmp_path):
  """Fails where the process that hears the signal ends alone, and the others miss it."""
  command = local_pod(2, 2, tmp_path, "--config.train.steps=2", "--config.eval.batch_size=4",
                      module="tests.slowly")
  program = pods.start(command, cache)
  pods.wait_for_step(program, tmp_path, 2)
  os.kill(pods.children(program)[1], signal.SIGTERM)
  output = pods.finish(program)
  assert output.count("resume with the same command") == 2
  assert not (tmp_path / "summary.json").exists()
  run(command, cache)
  assert json.loads((tmp_path / "summary.json").read_text())["results"]["clean"]["images"] == 103


@pytest.mark.parametrize(("where", "code", "says"), [
    ("0:3:metrics", 75, r"\[0\] Error: \S+metrics.jsonl cannot be written \(No space left"),
    pytest.param("1:3:step", 1, r"\[1\] OSError: .*No space left", marks=pytest.mark.slow)])
def test_what_one_process_alone_fails_of_all_say(cache, tmp_path, where, code, says):
  """Fails where the other waits for it, or is aborted by JAX, without a word of what went wrong."""
  command = local_pod(2, 1, tmp_path, "--config.train.steps=20", module="tests.faulty")
  output = run(command, cache, code=code, FULL=where)
  assert re.search(says, output)
  other = 1 - int(where[0])
  assert re.search(rf"\[{other}\] Process {other} of 2: another process of the pod is gone "
                   rf"\(process {where[0]}: .*No space left on device", output)
  assert "Fatal Python error" not in output


@pytest.mark.slow
@pytest.mark.parametrize("where", ["0:4:begin", "1:4:begin", "0:4:end"])
def test_a_full_disk_of_one_process(cache, tmp_path, where):
  """All stop with one sentence, or all go on: none waits for the one whose disk is full."""
  def command(workdir, on_failure):
    return local_pod(2, 2, workdir, "--config.train.steps=6", "--config.checkpoint.every_steps=2",
                     f"--config.checkpoint.on_failure={on_failure}", "--config.checkpoint.keep=5",
                     module="tests.faulty")

  full = {"FULL": where}
  says = r"The checkpoint of step 4 could not be written to .*No space left on device"
  output = run(command(tmp_path / "stop", "stop"), cache, code=75, **full)
  assert re.search(f"Error: {says}", output)
  assert "Traceback" not in output
  assert newest(tmp_path / "stop").step == 2
  output = run(command(tmp_path / "goes_on", "continue"), cache, **full)
  assert len(re.findall(f"Warning: {says}", output)) == 1
  assert sorted(path.name for path in (tmp_path / "goes_on/checkpoints").iterdir()) == ["2", "6"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_sends_all_back(cache, tmp_path):
  command = local_pod(2, 2, tmp_path, "--config.train.steps=6", "--config.checkpoint.every_steps=2",
                      "--config.optimizer.learning_rate=1e30", "--config.train.max_skips=1")
  output = run(command, cache, code=2)
  assert output.count("(1 of at most 1 times)") == 1
  assert len(re.findall(r"Error: step \d+: the \w+ is not finite", output)) >= 1
  assert "Traceback" not in output
