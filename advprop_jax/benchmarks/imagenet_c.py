"""ImageNet-C as released: 75 sets of files, in one pass.

  DIR/imagenet-c/gaussian_noise/3/n01440764/*.JPEG       (or DIR/gaussian_noise/3/...)
  DIR/imagenet2012_corrupted/gaussian_noise_3/VERSION/   TFDS; made by TFDS, not the released files

The images are of 224 pixels already, and are not cropped; for a network of another size they are
resized. *Source:* Hendrycks & Dietterich, ICLR 2019; hendrycks/robustness, ImageNet-C/test.py.
"""

import os
from collections.abc import Mapping
from typing import Any

from advprop_jax.benchmarks import mce
from advprop_jax.benchmarks.clean import CLEAN
from advprop_jax.benchmarks.contract import Benchmark, Measured, Pass, Row, Subject, Unavailable
from advprop_jax.benchmarks.imagenet_sets import benchmark_dir
from advprop_jax.data.imagenet_folder import open_imagenet
from advprop_jax.data.sources import Source, joined, open_source
from advprop_jax.data.transforms import evaluation_transform
from advprop_jax.errors import InputError

NAME = "imagenet_c"
TFDS = "imagenet2012_corrupted"
# Of the tars that the corruptions come in, where someone has kept them as folders.
GROUPS = ("", "noise", "blur", "weather", "digital")


def imagenet_c(subject: Subject) -> Benchmark:
  """Error of each corruption and severity, mCE and relative mCE."""
  subject.require_imagenet()
  found, faults = find(benchmark_dir(subject), subject.config.data.broken)
  if not found:
    reasons = "; ".join(dict.fromkeys(faults.values()))
    raise Unavailable(f"{benchmark_dir(subject)!r} (config.eval.dir) has none of its 75 sets, such "
                      f"as imagenet-c/gaussian_noise/1{f': {reasons}' if reasons else ''}")
  names = [set_name(*setting) for setting in found]
  sizes = list(map(len, found.values()))
  # Folders have one order, and TFDS' data another.
  alike = len(set(sizes)) == 1 and len({source.name for source in found.values()}) == 1
  one = Pass(source=joined(NAME, list(found.values())), sets=dict(zip(names, sizes, strict=True)),
             transform=evaluation_transform(subject.config.data.image_size), domain=subject.main,
             same_images=alike)

  def details(measured: Measured, rows: Mapping[str, Row]) -> dict[str, Any]:
    errors = errors_of(measured.sets[NAME])
    lacking = [set_name(*setting) for setting in mce.missing(errors)]
    clean = rows.get(CLEAN)
    clean = clean if subject.tests_on_validation else None
    reasons = [f"{name}: {fault}" for name, fault in faults.items()]
    note = "; ".join([f"no mCE without {', '.join(lacking)}", *reasons]) if lacking else ""
    return {**summary(errors, measured.rows[NAME]), "missing": lacking, "note": note,
            "mce": None if lacking else mce.mce(errors),
            "relative_mce": (None if lacking or clean is None
                             else mce.relative_mce(errors, 1 - clean["top1"]))}

  return Benchmark({NAME: one}, details)


def find(directory: str, broken: str) -> tuple[dict[tuple[str, int], Source], dict[str, str]]:
  """The sets that are there, {(corruption, severity): images} in their order, and what is wrong.

  Args:
    directory: that holds imagenet-c/, the corruptions themselves, or TFDS' data.
    broken: as config.data.broken.

  Returns:
    The sets, and {name of a set that is there and cannot be read: why}.
  """
  root = os.path.join(directory, "imagenet-c")
  root = root if os.path.isdir(root) else directory
  found, faults = {}, {}
  for name, severity in mce.SETTINGS:
    places = [os.path.join(group, name, str(severity)) for group in GROUPS]
    place = next((place for place in places if os.path.isdir(os.path.join(root, place))), None)
    tfds = f"{TFDS}/{name}_{severity}"
    try:
      if place is not None:
        found[name, severity] = open_imagenet(root, place, broken)
      elif os.path.isdir(os.path.join(directory, tfds)):
        found[name, severity] = open_source(tfds, directory, "validation")
    except InputError as error:
      faults[set_name(name, severity)] = str(error)
  return found, faults


def set_name(corruption: str, severity: int) -> str:
  """Of the set of one setting, such as "fog/3"."""
  return f"{corruption}/{severity}"


def errors_of(sets: Mapping[str, Row]) -> dict[str, dict[int, float]]:
  """{corruption: {severity: top-1 error}} of rows whose names are those of `set_name`."""
  errors = {}
  for name, row in sets.items():
    corruption, severity = name.split("/")
    errors.setdefault(corruption, {})[int(severity)] = 1 - row["top1"]
  return errors


def summary(errors: Mapping[str, Mapping[int, float]], row: Row) -> dict[str, Any]:
  """What is said of corrupted images of any data set."""
  return {"errors": errors, "mean_error": 1 - row["top1"], "standard_error": row["standard_error"],
          "images": row["images"] // sum(map(len, errors.values()))}
