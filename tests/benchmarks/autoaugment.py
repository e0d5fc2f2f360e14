"""Times AutoAugment and RandAugment and prints one JSON object; asserts nothing.

    python -m tests.benchmarks.autoaugment [--size=224] [--images=300] [--repeats=5]

Milliseconds per image of one thread: the median over the repeats of the mean over the images; and
of each operation at level 7 alone.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np
from PIL import Image

from advprop_jax.data.autoaugment import RANDAUGMENT_OPERATIONS, autoaugment, operate, randaugment


def milliseconds(action, images: int, repeats: int) -> float:
  """Of action(i), i in range(images)."""
  means = []
  for _ in range(repeats):
    start = time.perf_counter()
    for i in range(images):
      action(i)
    means.append((time.perf_counter() - start) / images * 1e3)
  return round(statistics.median(means), 3)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--images", type=int, default=300)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()

  rng = np.random.default_rng(0)
  # Noise on a slope: neither flat nor without structure.
  slope = np.linspace(20, 200, args.size)[:, None, None]
  image = (slope + rng.integers(0, 56, (args.size, args.size, 3))).astype(np.uint8)
  record = Image.fromarray(image)
  result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "size": args.size}
  for policy in (autoaugment, randaugment):
    result[f"{policy.__name__}_ms"] = milliseconds(
      lambda i, policy=policy: policy(image, np.random.default_rng(i)), args.images, args.repeats)
  for operation in RANDAUGMENT_OPERATIONS:
    result[f"{operation}_ms"] = milliseconds(
      lambda i, operation=operation: operate(record, operation, 7, np.random.default_rng(i)),
      max(args.images // 10, 1), args.repeats)
  # Both policies pay for their generator here, as they do under Grain.
  result["generator_ms"] = milliseconds(np.random.default_rng, args.images, args.repeats)
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  main()
