"""Random-access records of images and labels, read without TensorFlow.

Here: TFDS data prepared as array_record; the bundled set is no exception, it only lies in this
package. In folder.py: class folders. A new kind of source has to give a `Source`, and the loader
will take it; `experiment.open_split` has to know its name.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from advprop_jax.data import imagenet
from advprop_jax.data.decode import Encoded, decode
from advprop_jax.errors import InputError

BUNDLED = epath.Path(__file__).parent / "bundled"
BUNDLED_NAMES = {"bundled": "fashion_mnist_small", "fashion_mnist_small": "fashion_mnist_small"}
KEEP_IN_MEMORY = 256 * 2**20          # bytes of decoded images: small images yes, ImageNet no


class Records(Protocol):
  """What a source reads from: random access, picklable, safe in several threads."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """A split of a data set as random-access records.

  `len(source)` is the number of records, and `source[i]`, 0 <= i < len, is
  {"image": ..., "label": int in 0..num_classes-1}. The image is uint8 (h, w, 3), not to be written
  to, where decoded images are kept, else the bytes of a file; transforms take both, and
  decode.decode makes pixels of them. A source can be pickled, and read by several threads at once.

  Attributes:
    name: as in `data.name`.
    split: TFDS split, such as "train" or "train[:90%]".
    class_names: one name per class, in the order of the labels.
    records: where the records come from.
  """

  name: str
  split: str
  class_names: tuple[str, ...]
  records: Records

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.records[index]

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[i] for i in range(len(self)))


def joined(name: str, sources: Sequence[Source]) -> Source:
  """The records of some sources of the same classes, one source after the other, as one.

  Args:
    name: of the whole.
    sources: one or more.
  """
  ends = np.cumsum([len(source) for source in sources])
  records = JoinedRecords(tuple(source.records for source in sources), ends)
  return Source(name, "+".join(source.split for source in sources), sources[0].class_names, records)


@dataclasses.dataclass(frozen=True)
class JoinedRecords:
  """Records of several sources, one after the other."""

  parts: tuple[Records, ...]
  ends: np.ndarray                     # int (parts,): how many records there are up to each's end

  def __len__(self) -> int:
    return int(self.ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    part = int(np.searchsorted(self.ends, index, side="right"))
    return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]


def open_source(name: str, directory: str | None = None, split: str = "train",
                keep_in_memory: int = KEEP_IN_MEMORY) -> Source:
  """Opens one split of a TFDS data set that is prepared as array_record.

  Args:
    name: "bundled" (also "fashion_mnist_small"), or a TFDS name below `directory`: "NAME",
      "NAME/CONFIG" or "NAME:VERSION"; the newest version by default.
    directory: a TFDS data_dir, which holds NAME/VERSION, or the version's folder itself.
    split: a split's name or a part of one, as TFDS writes it: "train[:90%]".
    keep_in_memory: bytes. Records are kept once decoded if all of them, at the size that the data
      set states, take no more; 0 keeps none.

  Returns:
    The records. Their order is that of the files. The labels of ImageNet's 1000 classes are the
    standard ones, even where the data set has them in another order.

  Raises:
    InputError: no such data set, split or folder; not array_record; no image or label; a shard
      that is missing or cut short.
  """
  builder = _builder(name, directory)
  info = builder.info
  _check_features(name, info)
  _check_split(name, split, info)
  if "array_record" not in {file_format.value for file_format in info.available_file_formats()}:
    raise InputError(
      f"data.name={name!r} is prepared as {info.file_format.value}, which has no random access: "
      f"prepare it again with file_format=array_record (tfds build {info.name} "
      "--file_format=array_record)")
  instructions = info.splits[split].file_instructions
  _check_shards(name, instructions)
  records = TfdsRecords(f"{name} {split}", _undecoded(builder, split))
  height, width, _ = info.features["image"].shape
  if height and width and len(records) * height * width * 3 <= keep_in_memory:
    records = KeptRecords(records)
  class_names = tuple(info.features["label"].names)
  standard = imagenet.standard_labels(class_names)
  if standard is not None:
    class_names, records = imagenet.WNIDS, imagenet.StandardRecords(records, standard)
  return Source(name, split, class_names, records)


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
  """Records of TFDS, their images encoded.

  TFDS' own decoder warns when OpenCV is not there, and gives grey images one channel.
  """

  origin: str                          # for messages
  encoded: Sequence[dict[str, Any]]    # "image": bytes of PNG or JPEG, "label": int

  def __len__(self) -> int:
    return len(self.encoded)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      record = self.encoded[index]
    except RuntimeError as error:   # array_record's, for bytes that are not those written
      raise InputError(f"record {index} of {self.origin} cannot be read ({_one_line(error)}): copy "
                       "or prepare the data set again") from error
    if record["label"] < 0:
      raise InputError(f"record {index} of {self.origin} has no label: use another split")
    fault = f"record {index} of {self.origin} holds an image that does not decode"
    return {"image": Encoded(record["image"], fault, "prepare the data set again"),
            "label": int(record["label"])}


class KeptRecords:
  """Records of another sequence, decoded, and kept after the first access.

  Reading and decoding a small PNG costs about 100 microseconds, a kept record next to none. What
  is kept is not pickled: each worker process fills its own.
  """

  def __init__(self, records: Records):
    self._records = records
    self._kept: dict[int, dict[str, Any]] = {}

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self._kept.get(index)
    if record is None:                 # two threads may both read it, to the same effect
      record = dict(self._records[index])
      record["image"] = decode(record["image"])
      record["image"].flags.writeable = False
      self._kept[index] = record
    return record

  def __reduce__(self):
    return KeptRecords, (self._records,)


def _undecoded(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
  """TFDS' random access, with the label as an int and all else as it is in the file."""
  skip = {name: tfds.decode.SkipDecoding() for name in builder.info.features if name != "label"}
  return builder.as_data_source(split, decoders=skip)


def _builder(name: str, directory: str | None) -> tfds.core.DatasetBuilder:
  """Finds the version folder of a data set, and reads its description."""
  if name == "bundled" and directory:
    raise InputError(f"data.dir={str(directory)!r} is not read with data.name='bundled': set "
                     "data.name to what lies there ('folder' for class folders, or a TFDS name), "
                     "or leave data.dir unset")
  if name in BUNDLED_NAMES and not directory:
    name, directory = BUNDLED_NAMES[name], BUNDLED
  if not directory:
    raise InputError(f"data.name={name!r} is not bundled, and data.dir is not set: use "
                     "data.name='bundled', or set data.dir to the TFDS folder that holds it")
  root = epath.Path(directory).expanduser()
  try:
    there = root.exists()
  except Exception as error:           # of a bucket: no client for it, no network, no rights
    raise InputError(f"data.dir={str(directory)!r} cannot be reached ({_one_line(error)}): set it "
                     "to a TFDS folder that can") from error
  if not there:
    raise InputError(f"data.dir={str(directory)!r} does not exist: set it to the TFDS folder that "
                     f"holds {name!r}, or use data.name='bundled'")
  folder = root if _is_version(root) else _newest_version(name, root)
  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:           # TFDS raises what its parts do: protobuf, JSON, ValueError
    raise InputError(f"data.name={name!r} has a description that does not read in {str(folder)!r} "
                     f"({_one_line(error)}): prepare it again") from error
  if folder == root and builder.name != name.partition("/")[0].partition(":")[0]:
    raise InputError(f"data.dir={str(directory)!r} is the folder of {builder.name!r}, not of "
                     f"data.name={name!r}: set data.name={builder.name!r}, or another data.dir")
  return builder


def _newest_version(name: str, root: epath.Path) -> epath.Path:
  name, _, version = name.partition(":")
  folders = [path for path in _folders(root / name)
             if _is_version(path) and version in ("", path.name)]
  if folders:
    return max(folders, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
  configs = [f"{name}/{path.name}" for path in _folders(root / name)
             if any(map(_is_version, _folders(path)))]
  versions = [f"{name}:{path.name}" for path in _folders(root / name) if _is_version(path)]
  present = versions or configs or sorted(
    path.name for path in _folders(root)
    if any(_is_version(inner) or any(map(_is_version, _folders(inner)))
           for inner in _folders(path)))
  if not present:
    folders = ("data.name='imagenet_folder' or 'folder', which read class folders"
               if (root / "train").is_dir() else "data.name='bundled'")
    raise InputError(f"data.dir={str(root)!r} holds no data set that TFDS has prepared, so not "
                     f"data.name={name!r}: set data.dir to a folder that holds NAME/VERSION with "
                     f"a dataset_info.json, or use {folders}")
  asked = f"{name}:{version}" if version else name
  raise InputError(f"data.name={asked!r} is not in data.dir={str(root)!r}: "
                   f"there is {listed(present)}, and 'bundled' without a data.dir")


def _check_features(name: str, info: tfds.core.DatasetInfo) -> None:
  needed = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
  features = (dict(info.features.items())
              if isinstance(info.features, tfds.features.FeaturesDict) else {})
  for feature, kind in needed.items():
    if not isinstance(features.get(feature), kind):
      raise InputError(
        f"data.name={name!r} has no feature {feature!r} of type {kind.__name__}, only "
        f"{listed(sorted(features))}: use a data set for image classification")
  if features["image"].np_dtype != np.uint8:
    raise InputError(f"data.name={name!r} has images of {np.dtype(features['image'].np_dtype)}: "
                     "use a data set of uint8 images")


def _check_split(name: str, split: str, info: tfds.core.DatasetInfo) -> None:
  try:
    empty = info.splits[split].num_examples == 0
  except (KeyError, ValueError, AssertionError):
    raise InputError(f"split={split!r} is not in data.name={name!r}: there is "
                     f"{listed(list(info.splits))}") from None
  if empty:
    raise InputError(f"split={split!r} of data.name={name!r} is empty: use another split")


def _check_shards(name: str, instructions: Sequence[Any]) -> None:
  """Refuses shards that are missing or cut short, by the index at their end (about 1 ms each)."""
  def held(path: str) -> int:
    if not epath.Path(path).exists():
      return -1
    return ArrayRecordReader(path).num_records()        # 0 if it is broken, and then close() raises

  paths = [str(instruction.filename) for instruction in instructions]
  with ThreadPoolExecutor(8) as threads:
    found = list(threads.map(held, paths))
  for path, number, instruction in zip(paths, found, instructions, strict=True):
    if number != instruction.examples_in_shard:
      state = "is missing" if number < 0 else (
        f"is cut short ({number} of {instruction.examples_in_shard} records can be found)")
      raise InputError(f"data.name={name!r}: the file {path!r} {state}: "
                       "copy or prepare the data set again")


def _folders(path: epath.Path) -> list[epath.Path]:
  return [inner for inner in path.iterdir() if inner.is_dir()] if path.is_dir() else []


def _is_version(path: epath.Path) -> bool:
  return (path / "dataset_info.json").exists()


def listed(names: Sequence[str]) -> str:
  """'a', 'b' and 'c', at most ten of them."""
  quoted = [repr(name) for name in names[:10]]
  if len(names) > 10:
    return ", ".join(quoted) + f" and {len(names) - 10} more"
  return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1] if quoted else "nothing"]))


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
