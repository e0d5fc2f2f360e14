"""SIGKILL at 20 random times, of one process and of one in a pod of two: what it costs.

The table that it prints (`pytest -s -m slow tests/robustness/test_pod_killed.py`): of each kill,
when it was, the last step that was done, the step that the run went on from, how long the others
needed to end, and how long until a step was done again.
"""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from advprop_jax.runtime.metrics import table
from tests import pods

KILLS, EVERY, STEPS = 20, 5, 300
HEARTBEAT, START = 10, 30              # seconds after which a process is lost, or has not come
FLAGS = [f"--config.train.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]


def command_of(processes, workdir):
  return pods.of_processes(processes, workdir, *FLAGS, module="tests.slowly", grace=60, pod_flags=(
      f"--heartbeat_timeout={HEARTBEAT}", f"--start_timeout={START}"))


def kill_once(chance, processes, workdir, cache):
  """Starts the run, and kills it, or a process of it; a row of the table."""
  start, again = pods.Start.of(command_of(processes, workdir), workdir, cache), None
  program = start.program
  if chance.random() < 0.25:                     # while it starts
    time.sleep(chance.uniform(0, 6))
  else:
    again = start.wait_for_step(start.saved + 1)
    start.wait_for_step(start.saved + chance.randint(1, 18))
    time.sleep(chance.uniform(0, 0.3))
  assert program.poll() is None, program.stdout.read()
  victims = pods.children(program) if processes > 1 else [program.pid]
  if not victims:                                # the launcher has not started them yet
    victims = [program.pid]
  reached, killed = pods.last_step(workdir), time.monotonic()
  os.kill(chance.choice(victims), signal.SIGKILL)
  output, _ = program.communicate(timeout=120)
  ended = time.monotonic() - killed
  assert program.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), output
  return [killed - start.time, max(reached, pods.last_step(workdir)), pods.newest_step(workdir),
          ended, again]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_is_lost_but_the_steps_since_the_last_checkpoint(processes, tmp_path):
  """Fails where a kill leaves a checkpoint that is half, or a run that cannot go on, or others that
  hang; and where the end differs by a bit from that of a run that was left alone.
  """
  chance, cache, rows = random.Random(processes), tmp_path / "cache", []
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  pods.run(command_of(processes, undisturbed), cache)
  for number in range(KILLS):
    rows.append([number + 1, *kill_once(chance, processes, killed, cache)])
  print("\n" + table([[cell if cell is None else round(cell, 2) for cell in row] for row in rows], [
      "kill", "after s", "step done", "goes on from", "others ended s", "step again s"]))
  # A checkpoint is written while the steps after it are made: the one before may be the newest.
  assert all(step - whole <= 2 * EVERY for _, _, step, whole, _, _ in rows)
  assert rows[-1][3] > KILLS                     # it has come on meanwhile
  # One that waits for another to come cannot know that it is gone.
  assert all(ended < max(HEARTBEAT, START) + 10 for *_, ended, _ in rows)
  pods.run(command_of(processes, killed), cache)
  # Where a whole-looking checkpoint is not, a run takes an earlier one, and renames it.
  assert not list((killed / "checkpoints").glob("*.damaged*"))
  jax.tree.map(np.testing.assert_array_equal, pods.newest(killed).state,
               pods.newest(undisturbed).state)
  assert [line["step"] for line in pods.lines(killed) if "train/loss" in line] == list(
      range(1, STEPS + 1))
