"""`python -m tests.slowly FLAGS` is `python -m tests.one_block FLAGS` with slower steps.

Each takes 0.1 s or more, for tests that interrupt a run at a step.
"""

import time
from collections.abc import Iterator

from advprop_jax import main
from advprop_jax.data import loader
from tests import one_block

SECONDS = 0.1


class _Slowly(Iterator):
  """Batches, each of which takes its time."""

  def __init__(self, batches):
    self._batches = batches

  def __next__(self):
    time.sleep(SECONDS)
    return next(self._batches)

  def close(self):
    self._batches.close()


def slow_down() -> None:
  """Makes the steps of this process slow."""
  loader._iterate = lambda *settings, real=loader._iterate: _Slowly(real(*settings))


if __name__ == "__main__":
  one_block.register()
  slow_down()
  main.run()
