"""All faults but kills at random times, one after the other over one run: what each costs.

The table that it prints (`pytest -s -m slow tests/robustness/test_recovery.py`): of each fault, the
exit code and how long the run needed to end, the last step that was done, the step that the run
went on from, and how long it took from the command to the next new step.
"""

import os
import signal
import time

import jax
import numpy as np
import pytest

from advprop_jax.runtime.metrics import table
from tests import pods

EVERY, STEPS = 5, 150
HEARTBEAT, GRACE = 10, 5               # seconds after which a process is lost; is made to end
FLAGS = [f"--config.train.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]
KILLED = 128 + signal.SIGKILL
ABORTED = 128 + signal.SIGABRT


def command_of(processes, workdir):
  return pods.of_processes(processes, workdir, *FLAGS, module="tests.faulty", grace=GRACE,
                           pod_flags=(f"--heartbeat_timeout={HEARTBEAT}",))


def to_all(number):
  return lambda program: program.send_signal(number)


def to_one(number, process):
  return lambda program: os.kill(pods.children(program)[process], number)


def faults(processes):
  """(name, variables of the program that has it, what is done to the program, exit codes).

  A fault that variables describe happens when the next checkpoint but one, of {step}, is written,
  or in {batch}, behind it.
  """
  one = [
      ("SIGTERM", {}, to_all(signal.SIGTERM), (0,)),
      ("disk full as a checkpoint begins", {"FULL": "0:{step}:begin"}, None, (75,)),
      ("disk full as a checkpoint ends", {"FULL": "0:{step}:end"}, None, (75,)),
      ("killed as a checkpoint begins", {"KILLED": "0:{step}:begin"}, None,
       (-signal.SIGKILL, KILLED)),
      ("killed as a checkpoint ends", {"KILLED": "0:{step}:end"}, None,
       (-signal.SIGKILL, KILLED)),
      ("a loss that is no number", {"NOT_FINITE": "{batch}"}, None, (2,)),
  ]
  if processes == 1:
    return one
  return [*one, *[(f"{name}, process {process}", {}, to_one(number, process), codes)
                  for name, number, codes in (("SIGTERM", signal.SIGTERM, (0,)),
                                              ("SIGSTOP", signal.SIGSTOP, (3, ABORTED)))
                  for process in range(processes)],
          ("disk full as a checkpoint begins, process 1", {"FULL": "1:{step}:begin"}, None, (75,)),
          ("killed as a checkpoint begins, process 1", {"KILLED": "1:{step}:begin"}, None,
           (KILLED,))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_fault_is_followed_by_the_same_command(processes, tmp_path):
  """Fails where a fault ends in another exit code or makes a run hang, leaves a run that cannot go
  on or loses a checkpoint; and where the end differs by a bit from that of an undisturbed run.
  """
  undisturbed, disturbed, cache = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "cache"
  command, rows = command_of(processes, disturbed), []
  pods.run(command_of(processes, undisturbed), cache)
  for name, variables, act, codes in faults(processes):
    step = (pods.newest_step(disturbed) // EVERY + 2) * EVERY
    start = pods.Start.of(command, disturbed, cache, **{
        key: value.format(step=step, batch=step + 2) for key, value in variables.items()})
    again = start.wait_for_step(start.saved + 1)
    if rows:
      rows[-1].append(again)           # after the fault before
    if act:
      start.wait_for_step(start.saved + EVERY + 2)
      act(start.program)
    since = time.monotonic()
    output, _ = start.program.communicate(timeout=120)
    code = start.program.returncode
    assert code in codes, f"{name}: exit code {code}: {output}"
    rows.append([name, code, time.monotonic() - since if act else None,
                 pods.last_step(disturbed), pods.newest_step(disturbed)])
  start = pods.Start.of(command, disturbed, cache)
  rows[-1].append(start.wait_for_step(start.saved + 1))
  pods.finish(start.program)
  print("\n" + table([[round(cell, 1) if isinstance(cell, float) else cell for cell in row]
                      for row in rows],
                     ["fault", "exit code", "ended s", "step done", "goes on from",
                      "step again s"]))
  assert all(done - saved <= 2 * EVERY for _, _, _, done, saved, _ in rows)
  assert [saved for *_, saved, _ in rows] == sorted({saved for *_, saved, _ in rows})
  assert all(done == saved for name, _, _, done, saved, _ in rows if "SIGTERM" in name)
  jax.tree.map(np.testing.assert_array_equal, pods.newest(disturbed).state,
               pods.newest(undisturbed).state)
  assert [line["step"] for line in pods.lines(disturbed) if "train/loss" in line] == list(
      range(1, STEPS + 1))
