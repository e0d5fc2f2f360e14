"""`python -m tests.faulty FLAGS` is `python -m tests.slowly FLAGS` with the fault that it is told.

By the environment, as PROCESS:STEP:WHEN, and only there: where FULL says so the disk is full, where
KILLED says so the process is killed, as the checkpoint of that step begins on that process (WHEN is
"begin"), or when all else of it is written ("end", which happens on process 0). WHEN is "metrics":
as the metrics of that step are written, on process 0; "step": after it. NOT_FINITE=NUMBER: the loss
of that batch, from 1, is no number.
"""

import errno
import os
import signal

from advprop_jax import main, train
from advprop_jax.runtime import agreement, checkpoint, metrics
from tests import one_block, slowly


def _fault(step: int, when: str) -> None:
  here = f"{agreement.process()[0]}:{step}:{when}"
  if os.environ.get("KILLED") == here:
    os.kill(os.getpid(), signal.SIGKILL)
  if os.environ.get("FULL") == here:
    raise OSError(errno.ENOSPC, "No space left on device")


def _probe(self, real=checkpoint.Checkpoints._probe):
  if self._saving is not None:
    _fault(self._saving, "begin")
  real(self)


def _write_manifest(directory, real=checkpoint.write_manifest):
  _fault(int(directory.name.split(".")[0]), "end")
  real(directory)


def _add_event(self, step, real=metrics.MetricsWriter._add_event, **content):
  _fault(step, "metrics")
  real(self, step, **content)


def _require_finite(step, metrics, batches, real=train.require_finite):
  _fault(step, "step")
  if os.environ.get("NOT_FINITE") == str(batches):
    metrics = {**metrics, "loss": float("nan")}
  real(step, metrics, batches)


if __name__ == "__main__":
  checkpoint.SAVING_SECONDS = 10     # that the other waits for the one whose disk is full
  one_block.register()
  slowly.slow_down()
  checkpoint.Checkpoints._probe = _probe
  checkpoint.write_manifest = _write_manifest
  metrics.MetricsWriter._add_event = _add_event
  train.require_finite = _require_finite
  main.run()
