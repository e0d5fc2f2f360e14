"""Class folders as data: data.dir/SPLIT/CLASS/..., images of any format below.

What lies in them is known from an index (file_index.py), which names broken files at the start.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from advprop_jax.data.decode import Encoded, reason
from advprop_jax.data.file_index import Index, Paths, hidden, read_index
from advprop_jax.data.sources import KEEP_IN_MEMORY, KeptRecords, Source, listed
from advprop_jax.errors import InputError

OTHER_NAMES = {"test": ("test", "val", "validation")}    # of a split: the first that is there


def open_folder(directory: str | os.PathLike | None, split: str = "train", broken: str = "fatal",
                keep_in_memory: int = KEEP_IN_MEMORY) -> Source:
  """Opens one split of a folder of class folders.

  Classes are the folders in the split's folder, sorted by name; all files below one, however deep,
  are its images. Hidden files, and files beside the class folders, are not read. Pixels are as they
  are stored: an orientation in EXIF is not applied; of an animation the first frame counts.

  The order of records interleaves the classes: the k-th of a class's n files, sorted by path, is
  placed at (k + 1/2) / n. So any slice holds every class in its share, give or take one image.

  Args:
    directory: local; holds a folder for each split. In place of "test", "val" or "validation" do.
    split: a split's name or a part of one, as TFDS writes it: "train[:90%]", "train[100:200]".
    broken: "fatal", or "skip": files that are no whole images are left out, with a warning.
    keep_in_memory: bytes. Records are kept once decoded if all of them take no more; 0 keeps none.

  Returns:
    The records.

  Raises:
    InputError: no such folder or split; a class without images, or other classes than in "train";
      with "fatal", broken files.
  """
  root = _split_folder(directory, split)
  _check_classes(root)
  index, faults = read_index(root)
  report_broken(root, faults, len(index.paths), broken)
  class_names = sorted(path for path in index.folders if path and "/" not in path)
  numbers = {name: label for label, name in enumerate(class_names)}
  labels = np.array([numbers[path.partition("/")[0]] for path in index.paths], int)
  refuse_empty_classes(root, numbers, labels, len(faults))
  records = folder_records(root, split, index, labels, keep_in_memory)
  return Source("folder", split, tuple(class_names), records)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderRecords:
  """Records of one file each."""

  root: str                            # the split's folder
  paths: Sequence[str]                 # below root
  labels: np.ndarray                   # int, one for each path

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = pathlib.Path(self.root, self.paths[index])
    try:
      content = path.read_bytes()
    except OSError as error:
      raise InputError(f"the file {str(path)!r} cannot be read any longer ({reason(error)}): put "
                       "it back, or begin again") from error
    image = Encoded(content, f"the file {str(path)!r} does not decode", "mend or remove it")
    return {"image": image, "label": int(self.labels[index])}


def folder_records(root: pathlib.Path, split: str, index: Index, labels: np.ndarray,
                   keep_in_memory: int) -> FolderRecords | KeptRecords:
  """The records of one split of a folder, or of a part of it.

  Args:
    root: the split's folder.
    split: a split's name or a part of one, as TFDS writes it.
    index: of the folder.
    labels: int, one for each path of the index.
    keep_in_memory: as in `open_folder`.

  Raises:
    InputError: the part is empty, or is not there.
  """
  order = interleaved(labels)
  chosen = order[_part(root, split, len(order))]
  records = FolderRecords(str(root), Paths.of(index.paths[row] for row in chosen), labels[chosen])
  return KeptRecords(records) if 3 * index.pixels[chosen].sum() <= keep_in_memory else records


def _split_folder(directory: str | os.PathLike | None, split: str) -> pathlib.Path:
  parent = data_folder(directory, "folder", "train/CLASS/ and test/CLASS/")
  present = subfolders(parent)
  name = split.partition("[")[0]
  found = [other for other in OTHER_NAMES.get(name, (name,)) if other in present]
  if not found:
    raise InputError(f"split={split!r} is not in data.dir={str(directory)!r}: there is "
                     f"{listed(present)}")
  _instruction(split)
  return parent / found[0]


def data_folder(directory: str | os.PathLike | None, name: str, layout: str) -> pathlib.Path:
  """data.dir as a path; an InputError that says what should lie there, unless it is a folder.

  Args:
    directory: data.dir.
    name: data.name, which needs it.
    layout: what it should hold.
  """
  if not directory:
    raise InputError(f"data.name={name!r} needs data.dir: set it to a folder that holds {layout}")
  path = pathlib.Path(directory).expanduser()
  if not path.is_dir():
    state = "is a file, not a folder" if path.exists() else "does not exist"
    raise InputError(f"data.dir={str(directory)!r} {state}: set it to a folder on a local or "
                     f"mounted disk that holds {layout}")
  return path


def split_name(split: str) -> str:
  """The name in "train[:90%]"; an InputError where TFDS would not write it so."""
  _instruction(split)
  return split.partition("[")[0]


def _instruction(split: str) -> tfds.core.ReadInstruction:
  """What is read of a split, which is named "part" there: names of TFDS hold no "/"."""
  name = split.partition("[")[0]
  parts = ["part" + part[len(name):] if part.startswith(name) else part
           for part in split.split("+")]
  try:
    return tfds.core.ReadInstruction.from_spec("+".join(parts))
  except (ValueError, AssertionError):
    raise InputError(f"split={split!r} is not what TFDS would write: use a name or a part, such as "
                     "'train', 'train[:90%]' or 'train[100:200]'") from None


def _part(root: pathlib.Path, split: str, length: int) -> np.ndarray:
  """The places of the records that `split` asks for; percentages are rounded as TFDS does."""
  name = split.partition("[")[0]
  info = tfds.core.SplitInfo(name="part", shard_lengths=[length], num_bytes=0)
  try:
    parts = _instruction(split).to_absolute({"part": info})
  except (KeyError, ValueError, AssertionError):
    raise InputError(f"split={split!r} is no part of the {length} images in {str(root)!r}: use "
                     f"{name!r}, or less of it") from None
  places = np.concatenate([np.arange(length)[part.from_:part.to] for part in parts])
  if not places.size:
    raise InputError(f"split={split!r} of the {length} images in {str(root)!r} is empty: use "
                     "another split")
  return places


def _check_classes(root: pathlib.Path) -> None:
  """Refuses a split without class folders, or with others than "train" has, if there is one."""
  names = set(subfolders(root))
  if not names:
    raise InputError(f"data.dir={str(root.parent)!r} has no class folders in {root.name!r}: put "
                     f"the images of each class into {root.name}/CLASS/")
  train = root.with_name("train")
  expected = set(subfolders(train)) if train.is_dir() else names
  sides = {root.name: names - expected, "train": expected - names}
  if any(sides.values()):
    only = " and ".join(f"{listed(sorted(more))} in {side!r} alone"
                        for side, more in sides.items() if more)
    raise InputError(f"data.dir={str(root.parent)!r} has other class folders in {root.name!r} than "
                     f"in 'train', {only}: give both the same")


def report_broken(root: pathlib.Path, faults: dict[str, str], whole: int, broken: str) -> None:
  """Names broken files in an error or a warning, at most ten."""
  if not faults:
    return
  some = ", ".join(f"{path!r} ({reason})" for path, reason in sorted(faults.items())[:10])
  more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
  found = f"{len(faults)} of {len(faults) + whole} files in {str(root)!r} are no whole images"
  if broken != "skip":
    raise InputError(f"{found}: {some}{more}; mend or remove them, or set data.broken='skip' to "
                     "leave them out")
  logging.warning("%s, and left out: %s%s", found, some, more)


def refuse_empty_classes(root: pathlib.Path, numbers: Mapping[str, int], labels: np.ndarray,
                         broken: int) -> None:
  """Raises an InputError if a class has no image.

  Args:
    root: the split's folder.
    numbers: the label of each class that should have some.
    labels: int, one for each image.
    broken: number of files that are left out.
  """
  present = set(np.unique(labels).tolist())
  empty = [name for name, label in numbers.items() if label not in present]
  if empty:
    without = f"no image of class {listed(empty)}" if labels.size else "no images at all"
    left_out = f" ({broken} broken files are left out)" if broken else ""
    raise InputError(f"data.dir={str(root.parent)!r} has {without} in {root.name!r}{left_out}: add "
                     "images, or remove the class folder from every split")


def interleaved(labels: np.ndarray) -> np.ndarray:
  """Rows in the order of records that `open_folder` describes; rows of a class keep theirs."""
  counts = np.bincount(labels)
  by_label = np.argsort(labels, kind="stable")
  sorted_labels = labels[by_label]
  within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
  return by_label[np.lexsort((sorted_labels, (2 * within + 1) / (2 * counts[sorted_labels])))]


def subfolders(folder: pathlib.Path) -> list[str]:
  """Names of the folders in a folder that are not hidden, sorted; an InputError without access."""
  try:
    return sorted(path.name for path in folder.iterdir()
                  if path.is_dir() and not hidden(path.name))
  except OSError as error:
    raise InputError(f"the folder {str(folder)!r} cannot be read ({error.strerror}): make it "
                     "readable") from error
