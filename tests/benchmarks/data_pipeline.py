"""Measures the data path on the bundled set and prints one JSON object; asserts nothing.

    python -m tests.benchmarks.data_pipeline [--batch_size=128] [--batches=100] [--repeats=5]

For each number of threads that read ahead: records/s of wall time, and microseconds of CPU time
per record, which the training loop has to share its cores with. Each is the best of the repeats.
"""

import argparse
import json
import os
import time

import numpy as np

from advprop_jax.data.loader import TrainingBatches, evaluation_batches, training_batches
from advprop_jax.data.sources import open_source
from advprop_jax.data.transforms import evaluation_transform, training_transform

SIZE = 28


def measure(batches: TrainingBatches, batch_size: int, number: int, repeats: int) -> dict:
  """Best of `repeats` times `number` batches."""
  wall, cpu = [], []
  for _ in range(repeats):
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(number):
      next(batches)
    wall.append(time.perf_counter() - wall_start)
    cpu.append(time.process_time() - cpu_start)
  records = number * batch_size
  return {"records_per_s": round(records / min(wall)),
          "cpu_us_per_record": round(min(cpu) / records * 1e6, 1)}


def time_of(action) -> float:
  start = time.perf_counter()
  action()
  return round(time.perf_counter() - start, 3)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument("--batches", type=int, default=100)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()

  result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
  source = open_source("bundled")
  order = np.random.default_rng(0).permutation(len(source)).tolist()
  result["first_access_s"] = time_of(lambda: [source[i] for i in order])
  for name, keep in (("kept", source), ("not_kept", open_source("bundled", keep_in_memory=0))):
    for threads in (0, 1, 2, 4):
      batches = training_batches(keep, batch_size=args.batch_size, seed=0, num_threads=threads,
                                 transform=training_transform(SIZE))
      next(batches)
      number = args.batches if name == "kept" else max(args.batches // 5, 1)
      result[f"training_{name}_{threads}_threads"] = measure(
        batches, args.batch_size, number, args.repeats)
      batches.close()
  test = evaluation_batches(open_source("bundled", split="test"), batch_size=args.batch_size,
                            transform=evaluation_transform(SIZE))
  result["test_split_first_pass_s"] = time_of(lambda: list(test))
  result["test_split_second_pass_s"] = time_of(lambda: list(test))
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  main()
