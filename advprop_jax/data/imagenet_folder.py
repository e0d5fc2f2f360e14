"""ImageNet as folders, as most people have it, and the sets of images made for its classes.

  DIR/train/n01440764/*.JPEG                  training: all 1000 classes
  DIR/val/n01440764/*.JPEG                    also named validation/ or test/
  DIR/val/ILSVRC2012_val_00000001.JPEG        with a ground truth: imagenet_truth.py
  DIR/gaussian_noise/3/n01440764/*.JPEG       ImageNet-C: the split "gaussian_noise/3"
  DIR/imagenet-a/n01498041/*.jpg              ImageNet-A, -R, -Sketch, Stylized: "imagenet-a"
  DIR/imagenetv2-.../0/*.jpeg                 ImageNet-V2, whose folders are named by their index

Labels are always those of the 1000 classes in the order of their wnids, whatever a folder holds.

*Source:* hendrycks/robustness, hendrycks/natural-adv-examples, hendrycks/imagenet-r; modestyachts/
ImageNetV2, and its builder in TFDS: the folders of ImageNet-V2 are indices, and no wnids.
"""

import difflib
import logging
import os
import pathlib

import numpy as np

from advprop_jax.data.file_index import read_index
from advprop_jax.data.folder import (
  data_folder,
  folder_records,
  refuse_empty_classes,
  report_broken,
  split_name,
  subfolders,
)
from advprop_jax.data.imagenet import LABELS, WNIDS
from advprop_jax.data.imagenet_truth import labels_of_files
from advprop_jax.data.sources import KEEP_IN_MEMORY, Source, listed
from advprop_jax.errors import InputError

NAME = "imagenet_folder"               # in config.data.name
OTHER_NAMES = {"test": ("test", "val", "validation"), "val": ("val", "validation"),
               "validation": ("validation", "val")}      # of a split: the first that is there
WHOLE = ("train", "val", "validation", "test")           # splits that should have all classes
INDICES = {str(label): label for label in LABELS.values()}
LAYOUT = "train/n01440764/*.JPEG and val/n01440764/*.JPEG"


def open_imagenet(directory: str | os.PathLike | None, split: str = "train", broken: str = "fatal",
                  keep_in_memory: int = KEEP_IN_MEMORY, training: bool = False) -> Source:
  """Opens one split of ImageNet, or of another set with some of its classes.

  The order of records is that of `folder.open_folder`.

  Args:
    directory: local or mounted; holds the split.
    split: a folder in it, such as "train", "val" or "gaussian_noise/3", or a part of it, such as
      "train[:90%]". In place of "test", "val" or "validation" do.
    broken: "fatal", or "skip": files that are no whole images are left out, with a warning.
    keep_in_memory: bytes. Records are kept once decoded if all of them take no more; 0 keeps none.
    training: whether to train on it: then all 1000 classes have to be there.

  Returns:
    The records, whose class names are the 1000 wnids in their order.

  Raises:
    InputError: no such folder or split; classes that are not ImageNet's, or to train on, not all
      of them; a ground truth that is missing or wrong; with "fatal", broken files.
  """
  root = _split_folder(directory, split)
  folders = subfolders(root)
  numbers = _labels_of_folders(root, folders, training) if folders else {}
  index, faults = read_index(root)
  report_broken(root, faults, len(index.paths), broken)
  if folders and root.name in WHOLE:
    _warn_of_missing(root, numbers)
  if not index.paths:
    raise InputError(f"data.dir={str(directory)!r} has no images at all in {split!r}: it should "
                     f"hold {LAYOUT}")
  if folders:
    labels = np.array([numbers[path.partition("/")[0]] for path in index.paths], int)
  else:
    labels = labels_of_files(root, index.paths, len(faults))
  refuse_empty_classes(root, LABELS if training else numbers, labels, len(faults))
  return Source(NAME, split, WNIDS, folder_records(root, split, index, labels, keep_in_memory))


def _warn_of_missing(root: pathlib.Path, numbers: dict[str, int]) -> None:
  """Says what a split lacks whose name is that of a whole one: accuracy on it is another number."""
  missing = [wnid for wnid in WNIDS if LABELS[wnid] not in numbers.values()]
  if missing:
    logging.warning("%s lacks %d of the 1000 wnids (%s); only the others are evaluated", root,
                    len(missing), listed(missing))
  beside = sum(path.is_file() and path.suffix.lower() in (".jpeg", ".jpg", ".png")
               for path in root.iterdir())
  if beside:
    logging.warning("%s holds %d images beside its class folders, which are not read; move them "
                    "into their folders", root, beside)


def _split_folder(directory: str | os.PathLike | None, split: str) -> pathlib.Path:
  parent = data_folder(directory, NAME, LAYOUT)
  name = split_name(split)
  for other in OTHER_NAMES.get(name, (name,)):
    if other and (parent / other).is_dir():
      return parent / other
  # The first part of the path that is not there, and what is there in its place.
  inside = parent
  for part in pathlib.PurePath(name).parts:
    if not (inside / part).is_dir():
      break
    inside = inside / part
  present = subfolders(inside)
  close = difflib.get_close_matches(part if name else "", present, 1)
  meant = f" (did you mean {close[0]!r}?)" if close else ""
  if inside == parent and present and set(present) <= LABELS.keys():
    raise InputError(f"data.dir={str(directory)!r} holds class folders itself: set it to "
                     f"{str(parent.absolute().parent)!r}, and the split to {parent.name!r}")
  raise InputError(f"split={split!r} is not in data.dir={str(directory)!r}: in "
                   f"{str(inside)!r} there is {listed(present)}{meant}")


def _labels_of_folders(root: pathlib.Path, folders: list[str], training: bool) -> dict[str, int]:
  """The label of each class folder; refuses what is not ImageNet."""
  if set(folders) == INDICES.keys():   # fewer could be of anything, such as digits
    return INDICES
  unknown = [name for name in folders if name not in LABELS]
  missing = [wnid for wnid in WNIDS if wnid not in folders] if training else []
  if not unknown and not missing:
    return {name: LABELS[name] for name in folders}
  inner = [f"{root.name}/{name}" for name in unknown
           if any(inner in LABELS for inner in subfolders(root / name))]
  if inner:
    raise InputError(f"{str(root)!r} has no class folders, but folders that do: set the split to "
                     f"one of them, such as {inner[0]!r}")
  parts = []
  if unknown:
    parts.append(f"{len(unknown)} of its {len(folders)} folders are no wnids of ImageNet's 1000 "
                 f"classes ({listed(unknown)})")
  if missing:
    parts.append(f"{len(missing)} of the 1000 wnids are missing ({listed(missing)})")
  raise InputError(f"{str(root)!r} is no ImageNet{' to train on' if training else ''}: "
                   f"{' and '.join(parts)}; set data.dir to a folder that holds {LAYOUT}, or "
                   "data.name='folder' for other classes")
