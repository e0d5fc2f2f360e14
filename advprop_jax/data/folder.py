"""Class folders as data: data.dir/SPLIT/CLASS/..., images of any format below.

Every file is decoded once, and what was found is kept in an index, so that a broken file is known
before a run begins and not in its third hour. The next run looks only at the folders: it notices
whatever is added, removed, renamed or replaced by renaming, as that changes the modification time
or the number of entries of a folder. A file overwritten in place it does not notice before the
index is next built, unless the file was broken: broken files are tried again each time.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import UnidentifiedImageError
from tqdm import tqdm

from advprop_jax.data.sources import KEEP_IN_MEMORY, KeptRecords, Source, decode, listed
from advprop_jax.errors import InputError

OTHER_NAMES = {"test": ("test", "val", "validation")}    # of a split: the first that is there
HIDDEN = frozenset({"thumbs.db", "desktop.ini"})         # and all that begins with a dot
INDEX_VERSION = 1
SETTLED = 2 * 10**9        # ns: the coarsest clock of a file system, that of FAT
THREADS, CHUNK = 8, 64                                   # that decode, files at a time


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
    broken: "fatal", or "skip": files that do not decode are left out, with a warning.
    keep_in_memory: bytes. Records are kept once decoded if all of them take no more; 0 keeps none.

  Returns:
    The records.

  Raises:
    InputError: no such folder or split; a class without images, or other classes than in "train";
      with "fatal", broken files.
  """
  root = _split_folder(directory, split)
  _check_classes(root)
  index, faults = _index(root)
  _report_broken(root, faults, len(index.files), broken)
  class_names = sorted(path for path in index.folders if path and "/" not in path)
  paths, labels = _in_order(root, class_names, list(index.files), len(faults))
  chosen = _part(root, split, len(paths))
  records = FolderRecords(str(root), tuple(paths[chosen]), labels[chosen])
  pixels = sum(index.files[path][2] * index.files[path][3] for path in records.paths)
  return Source("folder", split, tuple(class_names),
                KeptRecords(records) if 3 * pixels <= keep_in_memory else records)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderRecords:
  """Records of one file each."""

  root: str                            # the split's folder
  paths: tuple[str, ...]               # below root
  labels: np.ndarray                   # int, one for each path

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = pathlib.Path(self.root, self.paths[index])
    try:
      image = decode(path.read_bytes())
    except Exception as error:         # as in _examined
      raise InputError(f"the file {str(path)!r} is no longer the image that was indexed "
                       f"({reason(error)}): mend or remove it") from error
    return {"image": image, "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class Index:
  """What is known of a split; paths are below the split's folder, with "/" between their parts.

  Attributes:
    folders: path -> [modification time in ns, number of entries].
    files: path -> [bytes, modification time in ns, width, height] of each image.
    broken: paths of the files that do not decode.
  """

  folders: dict[str, list[int]]
  files: dict[str, list[int]]
  broken: list[str]


def _split_folder(directory: str | os.PathLike | None, split: str) -> pathlib.Path:
  if not directory:
    raise InputError("data.name='folder' needs data.dir: set it to a folder that holds the images "
                     "of each class in train/CLASS/ and test/CLASS/")
  parent = pathlib.Path(directory).expanduser()
  if not parent.is_dir():
    state = "is a file, not a folder" if parent.exists() else "does not exist"
    raise InputError(f"data.dir={str(directory)!r} {state}: set it to a folder on a local or "
                     "mounted disk that holds train/CLASS/ and test/CLASS/")
  present = _folders(parent)
  name = split.partition("[")[0]
  found = [other for other in OTHER_NAMES.get(name, (name,)) if other in present]
  if not found:
    raise InputError(f"split={split!r} is not in data.dir={str(directory)!r}: there is "
                     f"{listed(present)}")
  _instruction(split)
  return parent / found[0]


def _instruction(split: str) -> tfds.core.ReadInstruction:
  try:
    return tfds.core.ReadInstruction.from_spec(split)
  except (ValueError, AssertionError):
    raise InputError(f"split={split!r} is not what TFDS would write: use a name or a part, such as "
                     "'train', 'train[:90%]' or 'train[100:200]'") from None


def _part(root: pathlib.Path, split: str, length: int) -> np.ndarray:
  """The places of the records that `split` asks for; percentages are rounded as TFDS does."""
  name = split.partition("[")[0]
  info = tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
  try:
    parts = _instruction(split).to_absolute({name: info})
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
  names = set(_folders(root))
  if not names:
    raise InputError(f"data.dir={str(root.parent)!r} has no class folders in {root.name!r}: put "
                     f"the images of each class into {root.name}/CLASS/")
  train = root.with_name("train")
  expected = set(_folders(train)) if train.is_dir() else names
  sides = {root.name: names - expected, "train": expected - names}
  if any(sides.values()):
    only = " and ".join(f"{listed(sorted(more))} in {side!r} alone"
                        for side, more in sides.items() if more)
    raise InputError(f"data.dir={str(root.parent)!r} has other class folders in {root.name!r} than "
                     f"in 'train', {only}: give both the same")


def _report_broken(root: pathlib.Path, faults: dict[str, str], whole: int, broken: str) -> None:
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


def _in_order(root: pathlib.Path, class_names: list[str], paths: list[str],
              broken: int) -> tuple[np.ndarray, np.ndarray]:
  """Paths, interleaved by class as `open_folder` says, and their labels."""
  numbers = {name: label for label, name in enumerate(class_names)}
  paths = np.array(sorted(paths, key=lambda path: (path.partition("/")[0], path)), object)
  labels = np.array([numbers[path.partition("/")[0]] for path in paths], int)
  counts = np.bincount(labels, minlength=len(class_names))
  if not counts.all():
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    without = "no images at all" if not paths.size else f"no image of class {listed(empty)}"
    left_out = f" ({broken} broken files are left out)" if broken else ""
    raise InputError(f"data.dir={str(root.parent)!r} has {without} in {root.name!r}{left_out}: add "
                     "images, or remove the class folder from every split")
  within = np.arange(len(paths)) - np.repeat(np.cumsum(counts) - counts, counts)
  order = np.lexsort((labels, (2 * within + 1) / (2 * counts[labels])))
  return paths[order], labels[order]


def _index(root: pathlib.Path) -> tuple[Index, dict[str, str]]:
  """The index of a split's folder, kept or new, and path -> reason for each broken file.

  A new one takes over what older ones know of files whose size and modification time are the same.
  Processes that start together may all build it; each puts its own in place as a whole.
  """
  places = _places(root)
  older = [index for index in map(_load, places) if index]
  kept = next((index for index in older if _unchanged(root, index)), None)
  if kept:
    folders, known, unknown = kept.folders, kept.files, kept.broken
  else:
    folders, found = _scan(root)
    known = {path: entry for index in older for path, entry in index.files.items()
             if found.get(path) == entry[:2]}
    unknown = [path for path in found if path not in known]
  examined = _examined(root, unknown)
  faults = {path: result for path, result in examined.items() if isinstance(result, str)}
  whole = {path: result for path, result in examined.items() if path not in faults}
  index = Index(folders, dict(sorted({**known, **whole}.items())), sorted(faults))
  if index != kept:
    _save(index, root, places)
  return index, faults


def _places(root: pathlib.Path) -> list[pathlib.Path]:
  """Where an index may lie: in data.dir, else in the user's cache."""
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
  digest = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:20]
  return [root.with_name(f".advprop_jax_{root.name}.json"),
          *([cache / "advprop_jax" / f"{digest}.json"] if cache.is_absolute() else [])]


def _load(place: pathlib.Path) -> Index | None:
  """An index, or None where there is none that reads."""
  try:
    content = json.loads(place.read_bytes())
    if content.pop("version") != INDEX_VERSION:
      return None
    index = Index(**content)
    entries = np.array(list(index.files.values()), np.int64)
    return index if entries.size == 4 * len(index.files) else None
  except (OSError, ValueError, TypeError, LookupError, AttributeError):
    return None


def _save(index: Index, root: pathlib.Path, places: Sequence[pathlib.Path]) -> None:
  """Writes the index to the first place that can be written, as a whole or not at all."""
  content = json.dumps({"version": INDEX_VERSION, **vars(index)})
  for place in places:
    temporary = place.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      temporary.write_text(content)
      os.replace(temporary, place)
      return
    except OSError:
      with contextlib.suppress(OSError):
        temporary.unlink()
  logging.warning("The index of %s can be written to none of %s; every start will decode all files",
                  root, ", ".join(map(str, places)))


def _unchanged(root: pathlib.Path, index: Index) -> bool:
  """Whether the folders are as they were; a folder that is new changes the one above it."""
  try:
    return all([(root / path).stat().st_mtime_ns, len(os.listdir(root / path))] == state
               for path, state in index.folders.items())
  except OSError:
    return False


def _scan(root: pathlib.Path) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
  """What lies below a split's folder: path -> state of folders, and of files; links are followed.

  The time of a folder is taken before it is listed. Where a change right after that could leave it
  the same, -1 stands in its place, and the next start lists again.
  """
  folders, files = {}, {}

  def visit(path: str, above: frozenset[tuple[int, int]]) -> None:
    status = (root / path).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:              # a link to a folder that it lies in
      return
    settled = time.time_ns() - status.st_mtime_ns > SETTLED
    with os.scandir(root / path) as iterator:
      entries = list(iterator)
    folders[path] = [status.st_mtime_ns if settled else -1, len(entries)]
    for entry in entries:
      below = f"{path}/{entry.name}" if path else entry.name
      if hidden(entry.name):
        continue
      if entry.is_dir():
        visit(below, above | {identity})
      elif path and entry.is_file():
        files[below] = [entry.stat().st_size, entry.stat().st_mtime_ns]
      elif path and entry.is_symlink():
        files[below] = []              # to nothing: broken

  try:
    visit("", frozenset())
  except OSError as error:
    raise InputError(f"data.dir={str(root.parent)!r} cannot be read ({error.strerror}: "
                     f"{str(error.filename)!r}): make all of it readable") from error
  return folders, files


def _examined(root: pathlib.Path, paths: Sequence[str]) -> dict[str, list[int] | str]:
  """Decodes files: path -> entry of `Index.files`, or why there is none."""
  def examine(path: str) -> list[int] | str:
    try:
      with open(root / path, "rb") as file:
        status, image = os.fstat(file.fileno()), decode(file.read())
    except Exception as error:         # Pillow's plugins raise whatever a broken file makes them
      return reason(error)
    return [status.st_size, status.st_mtime_ns, image.shape[1], image.shape[0]]

  def examine_some(start: int) -> list[list[int] | str]:
    results = [examine(path) for path in paths[start:start + CHUNK]]
    bar.update(len(results))
    return results

  # For a terminal, and only where it takes more than a moment.
  with (ThreadPoolExecutor(THREADS) as threads,
        tqdm(total=len(paths), desc=f"Looking once at {root}", unit=" files", delay=2, leave=False,
             disable=None) as bar):
    results = threads.map(examine_some, range(0, len(paths), CHUNK))
    return dict(zip(paths, (result for some in results for result in some), strict=True))


def reason(error: Exception) -> str:
  """Why a file is broken, in a few words."""
  if isinstance(error, UnidentifiedImageError):      # its own words hold an address in memory
    return "of no format that Pillow reads"
  text = " ".join((getattr(error, "strerror", None) or str(error)).split())
  return text[:100] or type(error).__name__


def _folders(folder: pathlib.Path) -> list[str]:
  try:
    return sorted(path.name for path in folder.iterdir()
                  if path.is_dir() and not hidden(path.name))
  except OSError as error:
    raise InputError(f"the folder {str(folder)!r} cannot be read ({error.strerror}): make it "
                     "readable") from error


def hidden(name: str) -> bool:
  """Whether files and folders of that name are not read."""
  return name.startswith(".") or name.lower() in HIDDEN
