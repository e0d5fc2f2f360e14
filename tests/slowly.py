"""`python -m tests.slowly FLAGS` is `python -m tests.one_block FLAGS` with slower steps.

Each takes 0.1 s or more, for tests that interrupt a run at a step.
"""

import time

from advprop_jax import main
from advprop_jax.runtime import parallel
from tests import one_block

SECONDS = 0.1


def _shard(batch, real=parallel.shard):
  time.sleep(SECONDS)
  return real(batch)


def slow_down() -> None:
  """Makes the steps of this process slow."""
  parallel.shard = _shard


if __name__ == "__main__":
  one_block.register()
  slow_down()
  main.run()
