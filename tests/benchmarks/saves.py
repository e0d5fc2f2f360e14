"""Times checkpoints of a train state: what a training waits for, and what it lacks beside them.

  python -m tests.benchmarks.saves --network=efficientnet_tiny --size=28 --classes=10

Prints one JSON line: medians of the seconds until `save` returns, until the checkpoint is whole on
disk, and of the cores' time for it, of which a step on the CPU has so much less.
"""

import json
import statistics
import tempfile
import time

import jax
from absl import app, flags

from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags
from tests.benchmarks.step import build

_SAVES = flags.DEFINE_integer("saves", 10, "checkpoints; the first two are not counted")


def main(argv):
  del argv
  set_flags()
  keep_freed_memory()
  _, state, _ = build("pgd1")
  returned, whole, cores = [], [], []
  with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    for number in range(_SAVES.value):
      start, used = time.perf_counter(), time.process_time()
      checkpoints.save(number, state, {}, {})
      returned.append(time.perf_counter() - start)
      checkpoints.wait()
      whole.append(time.perf_counter() - start)
      cores.append(time.process_time() - used)
  arrays = jax.tree.leaves(state)
  print(json.dumps({
      "arrays": len(arrays), "MiB": round(sum(x.nbytes for x in arrays) / 2**20, 1),
      **{name: round(statistics.median(seconds[2:]), 3) for name, seconds in {
          "seconds_until_returned": returned, "seconds_until_whole": whole,
          "seconds_of_cores": cores}.items()}}))


if __name__ == "__main__":
  app.run(main)
