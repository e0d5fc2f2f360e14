"""The classes of ImageNet: the order of their wnids, their names, and the subsets of them."""

import functools
import pathlib

_TABLE = pathlib.Path(__file__).with_name("imagenet_classes.tsv")   # index, wnid, name, in A, in R

_ROWS = [line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines()[1:]]

# Of the 1000 classes, in the order of the labels, which is the sorted one.
WNIDS: tuple[str, ...] = tuple(wnid for _, wnid, _, _, _ in _ROWS)


@functools.cache
def _names() -> dict[str, str]:
  return {wnid: name for _, wnid, name, _, _ in _ROWS}


def words(name: str) -> str:
  """A class's name for people: "tench" for the wnid n01440764; other names are as they are."""
  return _names().get(name, name)
