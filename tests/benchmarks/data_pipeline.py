"""Measures the data path of photographs, beside torchvision's, and that of the bundled set.

    python -m tests.benchmarks.data_pipeline [--photos=FOLDER_OF_JPEGS] [--repeats=31] [--bundled]

Images/s of one core: one thread, by CPU time, as other processes may share the machine; the two
sides take turns, and a number is the median over the repeats. Photographs are scaled to 500 x 375
and saved as JPEG, quality 90, 4:2:0; made-up ones by default. Without torchvision its columns are
left out. Asserts nothing.

torchvision's side is its standard one: PIL decodes, RandomResizedCrop(224) (bilinear, antialiased),
RandomHorizontalFlip, AutoAugment where it says so, ToTensor, Normalize. This project's side ends
with uint8; the device does the rest. "uint8 too" is torchvision without ToTensor and Normalize.

Measured with --photos and 20 photographs of ImageNet, --repeats=51, on two cores of an AMD EPYC
that other work shared (load 4); simplejpeg 1.9.0, cykooz-resizer 4.0.1, Pillow 13.0.0,
torchvision 0.28.0+cu130:

    images/s of one core                   here  torchvision  ratio
    -------------------------------------  ----  -----------  -----
    crop, flip                             1220          597   2.04
    crop, flip, AutoAugment                 910          502   1.81
    crop, flip, by the loader, from files   962          585   1.64
    crop, flip, bicubic as here            1220          535   2.28
    crop, flip, uint8 too                  1220          730   1.67
    crop, flip, AutoAugment, uint8 too      910          586   1.55
    evaluation, bicubic                     438          382   1.15

--bundled prints one JSON object in place of the table: for each number of threads that read ahead,
records/s of wall time, and microseconds of CPU time per record, each the best of the repeats.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from advprop_jax.data import decode, transforms
from advprop_jax.data.folder import open_folder
from advprop_jax.data.loader import TrainingBatches, evaluation_batches, training_batches
from advprop_jax.data.sources import open_source
from advprop_jax.data.transforms import evaluation_transform, training_transform
from advprop_jax.runtime.metrics import table
from tests.photographs import jpegs, opened

SIZE, SMALL, COPIES = 224, 28, 100
# A measure of this project, and of torchvision what it is compared with.
PAIRS = (("here: crop", "crop, flip"),
         ("here: AutoAugment", "crop, flip, AutoAugment"),
         ("here: loader", "crop, flip, by the loader, from files"),
         ("here: crop", "crop, flip, bicubic as here"),
         ("here: crop", "crop, flip, uint8 too"),
         ("here: AutoAugment", "crop, flip, AutoAugment, uint8 too"),
         ("here: evaluation", "evaluation, bicubic"))
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--photos", help="a folder of JPEGs")
  parser.add_argument("--repeats", type=int, default=31)
  parser.add_argument("--bundled", action="store_true", help="measure the bundled set instead")
  args = parser.parse_args()
  if args.bundled:
    print(json.dumps(bundled(batch_size=128, number=100, repeats=5), indent=2))
    return
  print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; JPEGs by "
        f"{'simplejpeg' if decode.simplejpeg else 'Pillow'}, crops scaled by "
        f"{'cykooz-resizer' if transforms.cykooz_resizer else 'Pillow'}")
  files = jpegs(args.photos)
  with tempfile.TemporaryDirectory() as folder:
    write_folder(files, pathlib.Path(folder, "train"))
    ours, theirs = own_side(files, folder), torchvision_side(files, folder)
    rates = images_per_second({**ours, **theirs}, len(files), args.repeats)
  rows = []
  for own, other in PAIRS:
    here, there = rates[own], rates.get(other)
    rows.append([other, round(here), there and round(there), there and round(here / there, 2)])
  print(table(rows, ["images/s of one core", "here", "torchvision", "ratio"]))


def write_folder(files: list[bytes], folder: pathlib.Path) -> None:
  """Two classes, each file under COPIES names: Grain's shuffling is slow for few records."""
  for number, file in enumerate(files):
    path = folder / str(number % 2) / f"{number:03}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file)
    for copy in range(1, COPIES):
      os.link(path, path.with_stem(f"{number:03}_{copy:03}"))


def images_per_second(actions: dict, images: int, repeats: int) -> dict:
  """Medians over the repeats, in which all actions take turns."""
  seconds = {name: [] for name in actions}
  for _ in range(repeats):
    for name, action in actions.items():
      start = time.process_time()
      action()
      seconds[name].append(time.process_time() - start)
  return {name: images / statistics.median(times) for name, times in seconds.items()}


def own_side(files: list[bytes], folder: str) -> dict[str, Callable[[], object]]:
  """What is measured of this project: name -> all images once."""
  def each(transform):
    generators = np.random.SeedSequence(0).spawn(len(files))
    return lambda: [transform(file, np.random.default_rng(seed))
                    for file, seed in zip(files, generators, strict=True)]

  crop, augmented = (training_transform(SIZE, augment, crop="random_resized")
                     for augment in ("crop_flip", "autoaugment"))
  evaluate = evaluation_transform(SIZE, 0.875)
  batches = training_batches(open_folder(folder, keep_in_memory=0), batch_size=len(files),
                             transform=crop, seed=0, num_threads=0)
  return {"here: crop": each(crop), "here: AutoAugment": each(augmented),
          "here: loader": lambda: next(batches),
          "here: evaluation": lambda: [evaluate(file) for file in files]}


def torchvision_side(files: list[bytes], folder: str) -> dict[str, Callable[[], object]]:
  """The same of torchvision; nothing, and a line that says so, where it is not there."""
  try:
    import torch
    from torchvision import datasets
    from torchvision import transforms as tv
  except (ImportError, RuntimeError) as error:
    print(f"torchvision is left out: {error}")
    return {}
  torch.set_num_threads(1)
  to_model = [tv.ToTensor(), tv.Normalize(MEAN, DEVIATION)]
  crop = [tv.RandomResizedCrop(SIZE), tv.RandomHorizontalFlip()]
  bicubic = tv.InterpolationMode.BICUBIC

  def each(*parts):
    transform = tv.Compose(parts)
    return lambda: [transform(opened(file)) for file in files]

  dataset = datasets.ImageFolder(os.path.join(folder, "train"), tv.Compose([*crop, *to_model]))
  batches = iter(torch.utils.data.DataLoader(dataset, batch_size=len(files), shuffle=True))
  return {
      "crop, flip": each(*crop, *to_model),
      "crop, flip, AutoAugment": each(*crop, tv.AutoAugment(), *to_model),
      "crop, flip, by the loader, from files": lambda: next(batches),
      "evaluation, bicubic": each(tv.Resize(256, bicubic), tv.CenterCrop(SIZE), *to_model),
      "crop, flip, uint8 too": each(*crop, tv.PILToTensor()),
      "crop, flip, AutoAugment, uint8 too": each(*crop, tv.AutoAugment(), tv.PILToTensor()),
      "crop, flip, bicubic as here": each(tv.RandomResizedCrop(SIZE, interpolation=bicubic),
                                          tv.RandomHorizontalFlip(), *to_model),
  }


def bundled(batch_size: int, number: int, repeats: int) -> dict:
  """What the bundled set costs, kept in memory and not."""
  result = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
  source = open_source("bundled")
  order = np.random.default_rng(0).permutation(len(source)).tolist()
  result["first_access_s"] = time_of(lambda: [source[i] for i in order])
  for name, keep in (("kept", source), ("not_kept", open_source("bundled", keep_in_memory=0))):
    for threads in (0, 1, 2, 4):
      batches = training_batches(keep, batch_size=batch_size, seed=0, num_threads=threads,
                                 transform=training_transform(SMALL))
      next(batches)
      result[f"training_{name}_{threads}_threads"] = measure(
        batches, batch_size, number if name == "kept" else max(number // 5, 1), repeats)
      batches.close()
  test = evaluation_batches(open_source("bundled", split="test"), batch_size=batch_size,
                            transform=evaluation_transform(SMALL))
  result["test_split_first_pass_s"] = time_of(lambda: list(test))
  result["test_split_second_pass_s"] = time_of(lambda: list(test))
  return result


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


if __name__ == "__main__":
  main()
