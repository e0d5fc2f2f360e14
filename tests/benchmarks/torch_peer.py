"""Runs a PyTorch script that times its steps by time.perf_counter, one step for each line read.

  python torch_peer.py SCRIPT ARGUMENTS

Before a step it waits for a line on its standard input; after it, it prints the seconds.
"""

import runpy
import sys
import time

_clock, _start = time.perf_counter, None


def perf_counter() -> float:
  """The clock, which waits where a step begins, and says where it ends."""
  global _start
  if _start is None:
    sys.stdin.readline()
    _start = _clock()
    return _start
  end = _clock()
  print(end - _start, flush=True)
  _start = None
  return end


if __name__ == "__main__":
  import timm  # noqa: F401  what is imported may use the clock too
  import torch._dynamo  # noqa: F401
  time.perf_counter = perf_counter
  sys.argv = sys.argv[1:]
  runpy.run_path(sys.argv[0], run_name="__main__")
