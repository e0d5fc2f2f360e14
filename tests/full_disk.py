"""`python -m tests.full_disk FLAGS` is `python -m tests.one_block FLAGS` on a disk that is full.

It is where FULL in the environment says, PROCESS:STEP:WHEN, and only there: as the checkpoint of
that step begins on that process (WHEN is "begin"), or when all else of it is written ("end", which
happens on process 0).
"""

import errno
import os

from advprop_jax import main
from advprop_jax.runtime import agreement, checkpoint
from tests import one_block


def _full():
  raise OSError(errno.ENOSPC, "No space left on device")


def _is_full(step: int, when: str) -> bool:
  return os.environ["FULL"] == f"{agreement.process()[0]}:{step}:{when}"


def _probe(self, real=checkpoint.Checkpoints._probe):
  if self._saving is not None and _is_full(self._saving, "begin"):
    _full()
  real(self)


def _write_manifest(directory, real=checkpoint.write_manifest):
  if _is_full(int(directory.name.split(".")[0]), "end"):
    _full()
  real(directory)


if __name__ == "__main__":
  checkpoint.SAVING_SECONDS = 10     # that the other waits for the one whose disk is full
  one_block.register()
  checkpoint.Checkpoints._probe = _probe
  checkpoint.write_manifest = _write_manifest
  main.run()
