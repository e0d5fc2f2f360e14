"""Train steps, and how long a byte takes from one core to another: whether these share a cache.

  python -m tests.benchmarks.cores --network=efficientnet_tiny --size=28 --batch=64 --classes=10

The cores of a virtual machine are threads of its host, which puts them where it likes. Where two of
them come to lie under different last caches, what one has written reaches the other late, and a
step, whose operations all cores share, takes twice as long and more. One JSON line per round:
seconds since the first, the median milliseconds of five steps, and nanoseconds of a round trip of a
byte between two processes that do nothing else, most of them Python's.
"""

import json
import mmap
import multiprocessing
import signal
import statistics
import time

import jax
from absl import app, flags

from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags
from tests.benchmarks.step import build

_CASE = flags.DEFINE_string("case", "pgd1", "as of tests.benchmarks.step")
_SECONDS = flags.DEFINE_float("seconds", 60, "how long")

TRIPS = 20_000


def echo(memory: mmap.mmap, asked) -> None:
  """Sends each number back, TRIPS times each time that it is asked to."""
  while asked.recv():
    signal.alarm(60)                   # the end, where who asked is gone
    for number in range(TRIPS):
      while memory[0] != number % 256:
        pass
      memory[64] = number % 256        # of another cache line
    signal.alarm(0)


def round_trip(memory: mmap.mmap, peer) -> float:
  """Nanoseconds from here to the peer and back, the mean of TRIPS."""
  memory[0] = memory[64] = 255
  peer.send(True)
  start = 0.0
  for number in range(TRIPS):
    memory[0] = number % 256
    while memory[64] != number % 256:
      pass
    start = start or time.perf_counter()     # of the first, when the peer is there
  return (time.perf_counter() - start) / (TRIPS - 1) * 1e9


def main(argv):
  del argv
  set_flags()
  keep_freed_memory()
  memory, (peer, theirs) = mmap.mmap(-1, 128), multiprocessing.Pipe()
  context = multiprocessing.get_context("fork")        # before JAX has threads
  context.Process(target=echo, args=(memory, theirs), daemon=True).start()
  theirs.close()
  step, state, batch = build(_CASE.value)
  step = step.lower(state, batch).compile()
  first = time.perf_counter()
  while time.perf_counter() - first < _SECONDS.value:
    seconds = []
    for _ in range(5):
      start = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
      seconds.append(time.perf_counter() - start)
    print(json.dumps({
        "second": round(time.perf_counter() - first, 1),
        "step_ms": round(1000 * statistics.median(seconds), 1),
        "round_trip_ns": round(round_trip(memory, peer))}), flush=True)
  peer.send(False)


if __name__ == "__main__":
  app.run(main)
