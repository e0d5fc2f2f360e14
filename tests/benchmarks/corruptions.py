"""Times corruptions in memory on all cores and prints one JSON object; asserts nothing.

    python -m tests.benchmarks.corruptions [--images=1000] [--size=224] [--workers=CORES]

Images/s over all 75 settings of ImageNet-C, through the loader and its worker processes, made-up
photographs in, batches out: with the start of the workers (imports, and numba compiles in each of
them), and from the first batch on. Then milliseconds of CPU time per image of each corruption, one
process, the mean over its severities.

Measured with 1,000 images of 224 pixels on two cores of an AMD EPYC that little else shared (load
0.8 before): 276 images/s, 272 s for 75,000; zoom_blur takes 45 % of it (48 ms an image).
"""

import argparse
import json
import os
import time

import numpy as np

from advprop_jax.benchmarks.corruptions import corrupt, corrupted
from advprop_jax.benchmarks.mce import CORRUPTIONS, SETTINGS, SEVERITIES
from advprop_jax.data.loader import evaluation_batches
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import evaluation_transform
from tests.photographs import photograph

DIFFERENT = 20                         # photographs, again and again


class Photographs:
  """Records without end of a few photographs."""

  def __init__(self, images: int, size: int):
    self._pixels = [photograph(size, size, seed) for seed in range(min(images, DIFFERENT))]
    self._images = images

  def __len__(self) -> int:
    return self._images

  def __getitem__(self, index: int) -> dict:
    return {"image": self._pixels[index % len(self._pixels)], "label": 0}


def through_the_loader(images: int, size: int, workers: int, batch_size: int) -> dict[str, float]:
  """Seconds and images/s of one pass through all settings."""
  source = Source("photographs", "test", ("any",), Photographs(images, size))
  as_it_is = evaluation_transform(size)
  batches = evaluation_batches(corrupted(source, as_it_is), batch_size=batch_size,
                               transform=as_it_is, num_workers=workers)
  start, counts, times = time.perf_counter(), [], []
  for batch in batches:
    counts.append(int(np.sum(batch["mask"])))
    times.append(time.perf_counter())
  return {"corrupted_images": sum(counts), "seconds": round(times[-1] - start, 1),
          "images_per_second": round(sum(counts) / (times[-1] - start), 1),
          "seconds_to_first_batch": round(times[0] - start, 1),
          "images_per_second_from_then_on": round(sum(counts[1:]) / (times[-1] - times[0]), 1)}


def cpu_milliseconds(name: str, size: int, repeats: int = 3) -> float:
  """Per image, the mean over the severities."""
  image = photograph(size, size)
  for severity in SEVERITIES:          # numba compiles
    corrupt(image, name, severity, 0)
  start = time.process_time()
  for seed in range(repeats):
    for severity in SEVERITIES:
      corrupt(image, name, severity, seed)
  return round((time.process_time() - start) / repeats / len(SEVERITIES) * 1e3, 2)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=1000)
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--batch_size", type=int, default=25)
  args = parser.parse_args()
  result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), **vars(args),
            "settings": len(SETTINGS)}
  result |= through_the_loader(args.images, args.size, args.workers, args.batch_size)
  result["cpu_ms_per_image"] = {name: cpu_milliseconds(name, args.size) for name in CORRUPTIONS}
  print(json.dumps(result, indent=2))


if __name__ == "__main__":               # worker processes import this module again
  main()
