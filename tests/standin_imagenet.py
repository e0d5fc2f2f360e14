"""A folder of ImageNet's form: its 1000 wnids, and photograph-like files of all its kinds.

  python -m tests.standin_imagenet DIR --train=2 --val=1 --broken=3

Of 24 images one each is grey, CMYK, a PNG named .JPEG, turned by EXIF, and padded behind its end;
two are progressive. The images of a class share their colours, so that there is something to learn.
What is written hangs on the arguments alone.
"""

import argparse
import io
import os
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from advprop_jax.data.imagenet import WNIDS

SMALLEST, LARGEST = 100, 700           # pixels of the longer side
PLAIN = "rgb"
KINDS = {1: "grey", 4: "cmyk", 7: "progressive", 10: "png", 13: "exif", 16: "padded",
         19: "progressive"}            # of images with this number modulo 24
BROKEN = ("cut", "empty", "text")
ORIENTATION, PADDING = 0x0112, b"\0" * 20


def kind(number: int) -> str:
  """What is special about the image of that number."""
  return KINDS.get(number % 24, PLAIN)


def photograph(label: int, number: int, largest: int = LARGEST) -> Image.Image:
  """A smooth RGB image with some noise; sides of 100 to `largest` pixels, at most 2 to 1."""
  generator = np.random.default_rng((label, number))
  longer = int(generator.integers(SMALLEST, max(SMALLEST, largest) + 1))
  size = [longer, int(longer * generator.uniform(0.5, 1)) + 1]
  generator.shuffle(size)
  palette = np.random.default_rng(label).integers(0, 256, (4, 4, 3))
  coarse = np.clip(palette + generator.normal(0, 60, (4, 4, 3)), 0, 255).astype(np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
  noise = generator.integers(-12, 13, (*smooth.shape[:2], 1), np.int16)
  return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = PLAIN) -> bytes:
  """The content of a file of that kind."""
  file, settings = io.BytesIO(), {"format": "JPEG", "quality": 90}
  if kind in ("grey", "cmyk"):
    image = image.convert({"grey": "L", "cmyk": "CMYK"}[kind])
  elif kind == "progressive":
    settings["progressive"] = True
  elif kind == "png":
    settings = {"format": "PNG"}
  elif kind == "exif":
    settings["exif"] = Image.Exif()
    settings["exif"][ORIENTATION] = 6
  image.save(file, **settings)
  return file.getvalue() + (PADDING if kind == "padded" else b"")


def broken(kind: str) -> bytes:
  """The content of a file that is no whole image."""
  whole = encoded(photograph(0, 0, SMALLEST))
  return {"cut": whole[:len(whole) * 2 // 3], "empty": b"", "text": b"<html>not found</html>"}[kind]


def make(directory: str | os.PathLike, train: int = 2, val: int = 1, broken_files: int = 0,
         largest: int = LARGEST, wnids: Sequence[str] = WNIDS) -> int:
  """Writes `train` and `val` images of each class, and broken ones besides.

  Args:
    directory: gets train/WNID/WNID_NUMBER.JPEG and val/WNID/ILSVRC2012_val_NUMBER.JPEG.
    train: images of each class.
    val: images of each class.
    broken_files: files of train/ that are cut short, empty or text, in turn.
    largest: pixels of the longest side.
    wnids: the classes.

  Returns:
    The number of whole images.
  """
  directory = pathlib.Path(directory)

  def write(task: tuple[str, int, int]) -> None:
    split, label, number = task
    wnid = wnids[label]
    name = f"{wnid}_{number}" if split == "train" else (
      f"ILSVRC2012_val_{number * len(wnids) + label + 1:08}")
    count = label * (train + val) + number + (0 if split == "train" else train)
    content = encoded(photograph(label, count, largest), kind(count))
    (directory / split / wnid / f"{name}.JPEG").write_bytes(content)

  tasks = [(split, label, number) for split, each in (("train", train), ("val", val))
           for label in range(len(wnids)) for number in range(each)]
  for split, label, number in tasks:
    if not number:
      (directory / split / wnids[label]).mkdir(parents=True, exist_ok=True)
  with ThreadPoolExecutor(os.cpu_count()) as threads:
    for _ in threads.map(write, tasks):
      pass
  for number in range(broken_files):
    wnid = wnids[number * 7 % len(wnids)]
    (directory / "train" / wnid / f"{wnid}_broken{number}.JPEG").write_bytes(
      broken(BROKEN[number % len(BROKEN)]))
  return len(tasks)


def main() -> None:
  """Makes one by the arguments of the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("directory")
  parser.add_argument("--train", type=int, default=2, help="images of each class in train/")
  parser.add_argument("--val", type=int, default=1, help="images of each class in val/")
  parser.add_argument("--broken", type=int, default=3, help="broken files in train/")
  parser.add_argument("--largest", type=int, default=300, help="pixels of the longest side; "
                      f"up to {LARGEST} is like ImageNet")
  given = parser.parse_args()
  start = time.perf_counter()
  number = make(given.directory, given.train, given.val, given.broken, given.largest)
  print(f"{number} images and {given.broken} broken files in {given.directory}, "
        f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  main()
