"""What has to be known of a checkpoint before it is read: that it is whole, and of this network.

Orbax alone is not enough: of a flipped byte in an array it makes other numbers without a word; of a
truncated array, pages of traceback. So the files of a checkpoint are listed with their sizes and
checksums, and damage is found before Orbax reads anything.
"""

import json
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from advprop_jax.errors import InputError, brief

MANIFEST = "files.json"
_CHUNK = 1 << 24   # bytes


class DamagedError(Exception):
  """A folder is not as it was written; the message is the reason, in a few words."""


def write_manifest(directory: epath.Path) -> None:
  """Writes MANIFEST: the size in bytes and the CRC-32 of every file in the folder's subfolders.

  The files beside MANIFEST are not listed: they are Orbax's, who adds to them afterwards, and
  nothing is read from them.
  """
  files = {str(path.relative_to(directory)): _size_and_crc(path)
           for folder in directory.iterdir() if folder.is_dir() for path in _walk(folder)}
  (directory / MANIFEST).write_text(json.dumps(files, indent=1))


def verify(directory: epath.Path) -> None:
  """Reads every file that MANIFEST lists.

  Raises:
    DamagedError: a file, or the list, is missing, has another size or another content.
    OSError: the disk does not let it be read, which says nothing of the files.
  """
  try:
    for name, (size, crc) in json.loads((directory / MANIFEST).read_text()).items():
      found_size, found_crc = _size_and_crc(directory / name)
      if found_size != size:
        raise DamagedError(f"{name} has {found_size} bytes instead of {size}")
      if found_crc != crc:
        raise DamagedError(f"the content of {name} has changed")
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
    raise DamagedError(f"{epath.Path(error.filename).relative_to(directory)} is missing") from error
  except (ValueError, AttributeError, TypeError) as error:
    raise DamagedError(f"{MANIFEST} cannot be read: {brief(error)}") from error


def check_tree(directory: epath.Path, target: Any, partial: bool) -> None:
  """Compares the names, types and shapes of a checkpoint's arrays with those wanted.

  Args:
    directory: of one checkpoint.
    target: a pytree of anything with shape and dtype.
    partial: the checkpoint may hold more.

  Raises:
    InputError: they differ; the message lists at most ten arrays.
  """
  saved = _leaves(ocp.PyTreeCheckpointHandler().metadata(directory / "state").tree)
  wanted = _leaves(target)
  faults = [f"{name} is {saved.get(name, 'not there')} instead of {kind}"
            for name, kind in wanted.items() if saved.get(name) != kind]
  if not partial:
    faults += [f"{name} is {kind} and has no place" for name, kind in saved.items()
               if name not in wanted]
  if faults:
    more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
    raise InputError(f"The checkpoint {directory} is of another network or optimizer: "
                     f"{'; '.join(faults[:10])}{more}; use its own config, or another --workdir.")


def _leaves(tree: Any) -> dict[str, str]:
  """Name -> "float32[3, 3]", the same for a dataclass and for the dicts that Orbax makes of it."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"):
          f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path


def _size_and_crc(path: epath.Path) -> list[int]:
  size = crc = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return [size, crc]
