"""Class folders of tiny images, for the tests that read them."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from advprop_jax.data.folder import open_folder
from advprop_jax.errors import InputError

INDEX = ".advprop_jax_train.npz"
BROKEN = {"text.jpg": b"no image at all", "empty.png": b"", "notes": b"\x89PNG\r\n\x1a\n"}


def pixels(number: int, height=4, width=5) -> np.ndarray:
  return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def save(path: pathlib.Path, number=0, **settings) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels(number, **settings)).save(path)
  return path


def animals(parent: pathlib.Path, **numbers: int) -> pathlib.Path:
  """A folder with train/ and test/ of so many PNGs per class; cat=4 and dog=3 by default."""
  for split in ("train", "test"):
    for name, number in (numbers or {"cat": 4, "dog": 3}).items():
      for i in range(number):
        save(parent / split / name / f"{i:03}.png", number=i)
  return parent


def add_broken(parent: pathlib.Path) -> list[str]:
  """Puts four broken files into train/cat: their paths, sorted."""
  for name, content in BROKEN.items():
    (parent / "train" / "cat" / name).write_bytes(content)
  whole = save(parent / "train" / "cat" / "cut.jpg", height=64, width=64)
  whole.write_bytes(whole.read_bytes()[:-400])
  return sorted(f"cat/{name}" for name in [*BROKEN, "cut.jpg"])


def aged(parent: pathlib.Path) -> pathlib.Path:
  """Lets all folders in it be an hour old: the index is sure of those."""
  for path in [parent, *parent.rglob("*")]:
    if path.is_dir():
      status = path.stat()
      os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 3600 * 10**9))
  return parent


def paths(source) -> tuple[str, ...]:
  records = source.records
  return tuple(getattr(records, "_records", records).paths)


def indexed(place: pathlib.Path) -> list[str]:
  """Paths of the images in an index."""
  with np.load(place) as content:
    return content["paths"].tobytes().decode().split("\0")[:-1]


def labels(source) -> list[int]:
  return [record["label"] for record in source]


def says(*parts: str, directory, split="train", opens=open_folder, **settings) -> str:
  """Opens what cannot be opened; the message is one line that holds the parts."""
  with pytest.raises(InputError) as caught:
    opens(directory, split, **settings)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message
  return message
