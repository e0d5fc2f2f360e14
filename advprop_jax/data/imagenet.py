"""The classes of ImageNet: the order of their wnids, their names, and the subsets of them."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_TABLE = pathlib.Path(__file__).with_name("imagenet_classes.tsv")   # index, wnid, name, in A, in R

_ROWS = [line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines()[1:]]

# Of the 1000 classes, in the order of the labels, which is the sorted one.
WNIDS: tuple[str, ...] = tuple(wnid for _, wnid, _, _, _ in _ROWS)

LABELS: dict[str, int] = {wnid: label for label, wnid in enumerate(WNIDS)}


# Labels of the 200 classes that ImageNet-A and ImageNet-R have images of.
CLASSES_OF_A: tuple[int, ...] = tuple(int(row[0]) for row in _ROWS if row[3] == "1")
CLASSES_OF_R: tuple[int, ...] = tuple(int(row[0]) for row in _ROWS if row[4] == "1")


@functools.cache
def _names() -> dict[str, str]:
  return {wnid: name for _, wnid, name, _, _ in _ROWS}


def words(name: str) -> str:
  """A class's name for people: "tench" for the wnid n01440764; other names are as they are."""
  return _names().get(name, name)


def standard_labels(class_names: Sequence[str]) -> np.ndarray | None:
  """The standard label of each of the 1000 classes, where a data set has them in another order.

  TFDS' imagenet_resized goes by ILSVRC2012_ID; imagenet2012 and all of its kin have the standard
  order.

  Args:
    class_names: in the order of the data set's own labels.

  Returns:
    int (1000,); None where the order is the standard one, or names are not the 1000 wnids.
  """
  if tuple(class_names) == WNIDS or tuple(sorted(class_names)) != WNIDS:
    return None
  return np.array([LABELS[name] for name in class_names])


@dataclasses.dataclass(frozen=True)
class StandardRecords:
  """Records of another sequence, under the standard labels."""

  records: Sequence[dict[str, Any]]
  labels: np.ndarray                   # int (1000,): by the label of the record

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.records[index]
    return {**record, "label": int(self.labels[record["label"]])}
