"""Which class each image of ImageNet's flat validation folder shows, by an official ground truth.

Four files are known, each by its name: Kaggle's LOC_val_solution.csv; the development kit's
ILSVRC2012_validation_ground_truth.txt, whose numbers are ILSVRC2012_IDs and mean nothing without
the meta.mat beside it, as their order is not that of the wnids; TensorFlow's and TFDS' lists of
wnids; and Caffe's val.txt, which has labels in the order of the wnids.

*Source:* kaggle.com/c/imagenet-object-localization-challenge (data description); readme.txt of
ILSVRC2012_devkit_t12; tensorflow/models, research/slim/datasets; BVLC/caffe,
data/ilsvrc12/get_ilsvrc_aux.sh.
"""

import csv
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy  # whose .io is loaded when it is asked for

from advprop_jax.data.imagenet import LABELS
from advprop_jax.data.sources import listed
from advprop_jax.errors import InputError

VALIDATION_IMAGES = 50_000
OFFICIAL = re.compile(r"ILSVRC2012_val_(\d{8})")         # a file's name, but for its suffix
NAMED = re.compile(r"(?<![a-zA-Z0-9])n\d{8}(?!\d)")      # a wnid in a file's name

Truth = dict[str, int] | list[int]     # by file name without suffix, or from the first image on


def labels_of_files(root: pathlib.Path, paths: Sequence[str], broken: int) -> np.ndarray:
  """The labels of images that lie in one folder without class folders.

  A wnid in the names of all files, as Hugging Face has it, tells; else a ground truth does that
  lies in the folder, in the one above, or in a folder of a development kit there.

  Args:
    root: the folder.
    paths: names of the images.
    broken: how many more images there are, which are left out.

  Returns:
    int (images,): indices in 0..999, in the order of the wnids.

  Raises:
    InputError: there is no ground truth, it does not read, is of another length, or lacks images.
  """
  named = [NAMED.findall(path) for path in paths]
  if all(named):
    unknown = sorted({wnids[-1] for wnids in named} - LABELS.keys())
    if unknown:
      raise InputError(f"the files in {str(root)!r} are named by wnids that are not of ImageNet's "
                       f"1000 classes: {listed(unknown)}; remove them")
    return np.array([LABELS[wnids[-1]] for wnids in named], int)
  if any(pathlib.Path(path).stem.startswith("ILSVRC2012_test_") for path in paths):
    raise InputError(f"{str(root)!r} holds ImageNet's test images, whose labels are not public: "
                     "use the split 'val'")
  file, read = _find(root)
  try:
    truth = read(file)
  except (OSError, ValueError, LookupError, TypeError, csv.Error, zlib.error) as error:
    raise InputError(f"the ground truth {str(file)!r} does not read "
                     f"({' '.join(str(error).split())[:100]}): get it again") from error
  if isinstance(truth, list):
    truth = _by_name(truth, file, root, paths, len(paths) + broken)
  stems = [pathlib.Path(path).stem for path in paths]
  missing = [path for path, stem in zip(paths, stems, strict=True) if stem not in truth]
  if missing:
    raise InputError(f"the ground truth {str(file)!r} says nothing of {len(missing)} of the "
                     f"{len(paths)} images in {str(root)!r}: {listed(missing)}; remove what is not "
                     "ImageNet's, or get the file again")
  return np.array([truth[stem] for stem in stems], int)


def _find(root: pathlib.Path) -> tuple[pathlib.Path, Callable[[pathlib.Path], Truth]]:
  """The first ground truth there is, and what reads it."""
  kits = sorted(path for path in root.parent.iterdir()
                if "devkit" in path.name.lower() and path.is_dir())
  for folder in (root, root.parent, *(place for kit in kits for place in (kit, kit / "data"))):
    for name, read in READERS.items():
      if (folder / name).is_file():
        return folder / name, read
  raise InputError(
      f"{str(root)!r} has images, but neither class folders nor a ground truth: put "
      f"{', '.join(READERS)} or, for the development kit's, meta.mat as well into "
      f"{str(root.parent)!r}, or move the images into {root.name}/WNID/")


def _by_name(truth: list[int], file: pathlib.Path, root: pathlib.Path, paths: Sequence[str],
             images: int) -> dict[str, int]:
  """Labels by the numbers of the images; a list of another length could be of something else."""
  if len(truth) not in (VALIDATION_IMAGES, images):
    raise InputError(f"the ground truth {str(file)!r} has {len(truth)} labels, where {images} "
                     f"images are in {str(root)!r} and {VALIDATION_IMAGES} in ImageNet: get it "
                     "again")
  other = [path for path in paths if not OFFICIAL.fullmatch(pathlib.Path(path).stem)]
  if other:
    raise InputError(f"the ground truth {str(file)!r} goes by numbers, which {len(other)} of the "
                     f"files in {str(root)!r} do not have: {listed(other)}; their names should be "
                     "like ILSVRC2012_val_00000001.JPEG")
  return {f"ILSVRC2012_val_{number:08}": label for number, label in enumerate(truth, 1)}


def _lines(file: pathlib.Path) -> Iterator[list[str]]:
  """The words of each line; empty lines at the end are none."""
  return (line.split() for line in file.read_text(encoding="utf-8").rstrip().splitlines())


def _label(wnid: str) -> int:
  if wnid not in LABELS:
    raise ValueError(f"{wnid!r} is no wnid of ImageNet's 1000 classes")
  return LABELS[wnid]


def _kaggle(file: pathlib.Path) -> dict[str, int]:
  """Rows of an image's name and its boxes, each with the class's wnid before it."""
  with open(file, newline="", encoding="utf-8") as content:
    return {row["ImageId"]: _label(row["PredictionString"].split()[0])
            for row in csv.DictReader(content)}


def _wnids(file: pathlib.Path) -> list[int]:
  return [_label(wnid) for (wnid,) in _lines(file)]


def _caffe(file: pathlib.Path) -> dict[str, int]:
  truth = {pathlib.PurePosixPath(name).stem: int(label) for name, label in _lines(file)}
  wrong = sorted(set(truth.values()) - set(LABELS.values()))
  if wrong:
    raise ValueError(f"labels such as {wrong[0]}, not 0 to {len(LABELS) - 1}")
  return truth


def _development_kit(file: pathlib.Path) -> list[int]:
  """Lines of ILSVRC2012_IDs, 1 to 1000, which meta.mat gives to wnids."""
  meta = next((path for path in (file.with_name("meta.mat"), file.parent / "data" / "meta.mat")
               if path.is_file()), None)
  if meta is None:
    raise FileNotFoundError("its numbers mean nothing without the development kit's meta.mat, "
                            "which is not beside it")
  synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
  wnids = {int(number): str(wnid) for number, wnid in
           zip(synsets["ILSVRC2012_ID"].ravel(), synsets["WNID"].ravel(), strict=True)}
  return [_label(wnids[int(number)]) for (number,) in _lines(file)]


READERS: dict[str, Callable[[pathlib.Path], Truth]] = {
  "LOC_val_solution.csv": _kaggle,
  "imagenet_2012_validation_synset_labels.txt": _wnids,
  "validation_labels.txt": _wnids,
  "val.txt": _caffe,
  "ILSVRC2012_validation_ground_truth.txt": _development_kit,
}
