"""An index of the image files below a folder: made once, kept beside it, renewed where it changed.

Each file is looked at once, so that a broken one is known before a run begins and not in its third
hour: of a JPEG the header and the end (jpeg_header.py), all else is decoded. The next run looks
only at the folders: it notices whatever is added, removed, renamed or replaced by renaming, as that
changes the modification time or the number of entries of a folder. A file overwritten in place it
does not notice before the index is next built, unless the file was broken: broken files are tried
again each time. Damage in the middle of a JPEG is noticed when it is read.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from advprop_jax.data.decode import decode, reason
from advprop_jax.data.jpeg_header import whole_jpeg_size
from advprop_jax.errors import InputError

HIDDEN = frozenset({"thumbs.db", "desktop.ini"})         # and all that begins with a dot
NO_IMAGES = frozenset({".txt", ".csv", ".mat", ".json", ".md", ".sh", ".tar", ".gz", ".zip"})
INDEX_VERSION = 2
SETTLED = 2 * 10**9        # ns: the coarsest clock of a file system, that of FAT
CHUNK = 64                                               # files at a time
# More than cores, as a disk behind a network answers late, and many at once.
THREADS = min(64, max(8, 4 * (os.cpu_count() or 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """What is known of a folder; paths are below it, with "/" between their parts.

  Attributes:
    folders: path -> (modification time in ns, number of entries).
    paths: of each image, sorted by their first part, then as a whole.
    entries: int64 (images, 4): bytes, modification time in ns, width and height in pixels.
    broken: paths of the files that are no whole images, sorted.
  """

  folders: dict[str, tuple[int, int]]
  paths: list[str]
  entries: np.ndarray
  broken: list[str]

  @property
  def pixels(self) -> np.ndarray:
    """int64 (images,): width x height."""
    return self.entries[:, 2] * self.entries[:, 3]


@dataclasses.dataclass(frozen=True, eq=False)
class Paths(Sequence[str]):
  """Many strings in little memory: a million file names as objects take 100 MB in every process."""

  text: bytes
  ends: np.ndarray                     # int64: of each string within the text

  @classmethod
  def of(cls, paths: Iterable[str]) -> "Paths":
    """Packs strings."""
    encoded = [os.fsencode(path) for path in paths]
    return cls(b"".join(encoded), np.cumsum([len(path) for path in encoded], dtype=np.int64))

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: int) -> str:
    index = range(len(self.ends))[index]
    start = self.ends[index - 1] if index else 0
    return os.fsdecode(self.text[start:self.ends[index]])


def read_index(root: pathlib.Path) -> tuple[Index, dict[str, str]]:
  """The index of a folder, kept or new, and path -> reason for each broken file.

  All files below its folders count, however deep, but hidden ones; those in the folder itself only
  where it has no folders, and not if their names end like those of texts and archives. A new index
  takes over what older ones know of files whose size and modification time are the same. Processes
  that start together may all build it; each puts its own in place as a whole.

  Args:
    root: a folder.

  Returns:
    The index, which lies in a hidden file beside the folder from now on, else in the user's cache,
    else nowhere; and why files are broken, in a few words each.

  Raises:
    InputError: something below the folder cannot be listed.
  """
  places = _places(root)
  older = [index for index in map(_load, places) if index]
  kept = next((index for index in older if _unchanged(root, index)), None)
  if kept:
    folders, known, unknown = kept.folders, [kept], kept.broken
  else:
    folders, found = _scan(root, with_states=bool(older))
    known = [_still(index, found) for index in older[:1]]
    unknown = sorted(found.keys() - known[0].paths) if known else list(found)
  entries, faults = _examined(root, unknown)
  whole = Index({}, [path for path in unknown if path not in faults], entries, [])
  index = Index(folders, *_merged([*known, whole]), sorted(faults))
  if not kept or whole.paths or index.broken != kept.broken:
    _save(index, root, places)
  return index, faults


def hidden(name: str) -> bool:
  """Whether files and folders of that name are not read."""
  return name.startswith(".") or name.lower() in HIDDEN


def _order(path: str) -> tuple[str, str]:
  return path.partition("/")[0], path


def _still(index: Index, found: dict[str, tuple[int, int] | None]) -> Index:
  """The part of an older index whose files are as they were."""
  rows = [row for row, (path, state) in enumerate(zip(index.paths, index.entries[:, :2].tolist(),
                                                      strict=True))
          if found.get(path) == tuple(state)]
  return Index({}, [index.paths[row] for row in rows], index.entries[rows], [])


def _merged(parts: Sequence[Index]) -> tuple[list[str], np.ndarray]:
  """Paths and entries of several indices that share none, in order."""
  if not parts[-1].paths:
    return parts[0].paths, parts[0].entries
  paths = [path for part in parts for path in part.paths]
  rows = sorted(range(len(paths)), key=lambda row: _order(paths[row]))
  return [paths[row] for row in rows], np.concatenate([part.entries for part in parts])[rows]


def _places(root: pathlib.Path) -> list[pathlib.Path]:
  """Where an index may lie: beside the folder, else in the user's cache."""
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
  digest = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:20]
  return [root.with_name(f".advprop_jax_{root.name}.npz"),
          *([cache / "advprop_jax" / f"{digest}.npz"] if cache.is_absolute() else [])]


def _load(place: pathlib.Path) -> Index | None:
  """An index, or None where there is none that reads."""
  try:
    with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as content:
      if int(content["version"]) != INDEX_VERSION:
        return None
      folders, paths, broken = (_strings(content[name]) for name in ("folders", "paths", "broken"))
      states, entries = content["folder_states"], content["entries"]
    if states.shape != (len(folders), 2) or entries.shape != (len(paths), 4):
      return None
    states = map(tuple, states.astype(np.int64).tolist())
    return Index(dict(zip(folders, states, strict=True)), paths, entries.astype(np.int64), broken)
  except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError,
          NotImplementedError, zipfile.BadZipFile, zlib.error):
    return None


def _save(index: Index, root: pathlib.Path, places: Sequence[pathlib.Path]) -> None:
  """Writes the index to the first place that can be written, as a whole or not at all."""
  content = io.BytesIO()
  states = np.array(list(index.folders.values()), np.int64).reshape(-1, 2)
  np.savez_compressed(
    content, version=INDEX_VERSION, folders=_bytes(index.folders), paths=_bytes(index.paths),
    broken=_bytes(index.broken), folder_states=states, entries=index.entries)
  why = None
  for place in places:
    temporary = place.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      temporary.write_bytes(content.getbuffer())
      os.replace(temporary, place)
      return
    except OSError as error:
      why = why or reason(error)
      with contextlib.suppress(OSError):
        temporary.unlink()
  logging.warning("The index of %s can be written to none of %s (%s); every start will look at all "
                  "files", root, ", ".join(map(str, places)), why)


def _bytes(strings: Iterable[str]) -> np.ndarray:
  """Strings as bytes, each with a zero after it, which is in no path."""
  return np.frombuffer(b"".join(os.fsencode(string) + b"\0" for string in strings), np.uint8)


def _strings(text: np.ndarray) -> list[str]:
  return os.fsdecode(text.tobytes()).split("\0")[:-1]


def _unchanged(root: pathlib.Path, index: Index) -> bool:
  """Whether the folders are as they were; a folder that is new changes the one above it."""
  def same(path: str) -> bool:
    folder = root / path
    return (folder.stat().st_mtime_ns, len(os.listdir(folder))) == index.folders[path]

  try:
    with ThreadPoolExecutor(THREADS) as threads:
      return "" in index.folders and all(threads.map(same, index.folders))
  except OSError:
    return False


def _scan(root: pathlib.Path, with_states: bool
          ) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int] | None]]:
  """What lies below a folder: path -> state of folders, and of files; links are followed.

  The time of a folder is taken before it is listed. Where a change right after that could leave it
  the same, -1 stands in its place, and the next start lists again. Without `with_states` that of
  files is None, which saves a question for each.
  """
  folders, files = {}, {}

  def visit(path: str, above: frozenset[tuple[int, int]]) -> list[tuple[str, frozenset]]:
    """Enters what lies in a folder, and gives the folders in it."""
    status = (root / path).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:              # a link to a folder that it lies in
      return []
    settled = time.time_ns() - status.st_mtime_ns > SETTLED
    with os.scandir(root / path) as iterator:
      entries = list(iterator)
    folders[path] = (status.st_mtime_ns if settled else -1, len(entries))
    seen = [entry for entry in entries if not hidden(entry.name)]
    inner = [entry for entry in seen if entry.is_dir()]
    flat = not path and not inner
    for entry in seen:
      if not path and not (flat and pathlib.Path(entry.name).suffix.lower() not in NO_IMAGES):
        continue
      below = f"{path}/{entry.name}" if path else entry.name
      if entry.is_file():
        status = entry.stat() if with_states else None
        files[below] = (status.st_size, status.st_mtime_ns) if status else None
      elif entry.is_symlink() and not entry.is_dir():
        files[below] = None            # to nothing: broken
    return [(f"{path}/{entry.name}" if path else entry.name, above | {identity})
            for entry in inner]

  try:
    with ThreadPoolExecutor(THREADS) as threads:
      level = visit("", frozenset())
      while level:
        level = [each for some in threads.map(lambda task: visit(*task), level) for each in some]
  except OSError as error:
    raise InputError(f"data.dir={str(root.parent)!r} cannot be read ({error.strerror}: "
                     f"{str(error.filename)!r}): make all of it readable") from error
  return dict(sorted(folders.items())), files


def _examined(root: pathlib.Path, paths: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
  """Looks at files: the entries of those that are whole, and path -> reason for the others."""
  entries, faults = np.zeros((len(paths), 4), np.int64), {}

  def examine_some(start: int) -> None:
    for row in range(start, min(start + CHUNK, len(paths))):
      try:
        entries[row] = _entry(root / paths[row])
      except Exception as error:       # Pillow's plugins raise whatever a broken file makes them
        faults[paths[row]] = reason(error)
    bar.update(min(CHUNK, len(paths) - start))

  # For a terminal, and only where it takes more than a moment.
  with (ThreadPoolExecutor(THREADS) as threads,
        tqdm(total=len(paths), desc=f"Looking once at {root}", unit=" files", delay=2, leave=False,
             disable=None) as bar):
    list(threads.map(examine_some, range(0, len(paths), CHUNK)))
  return entries[[path not in faults for path in paths]], dict(sorted(faults.items()))


def _entry(path: pathlib.Path) -> tuple[int, int, int, int]:
  """A row of `Index.entries`; raises whatever decoding raises."""
  with open(path, "rb") as file:
    status, size = os.fstat(file.fileno()), whole_jpeg_size(file)
    if size is None:
      file.seek(0)
      height, width, _ = decode(file.read()).shape
      size = width, height
  return status.st_size, status.st_mtime_ns, *size
