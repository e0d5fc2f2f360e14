"""ImageNet-C's 15 corruptions, made in memory: for any data set, and the same at every run.

Not comparable to the released ImageNet-C: those are files, JPEGs once more, drawn with another seed
and older libraries. Nor to CIFAR-10-C and the like: the strengths are those for 224 pixels, blurs
and shifts in pixels among them, and so far stronger for small images.

The corruptions are those of PyPI imagecorruptions-imaug, an optional requirement (numba, OpenCV,
scikit-image).
"""

import dataclasses
import functools
import importlib.metadata
import threading
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from advprop_jax.benchmarks.mce import CORRUPTIONS, SETTINGS, SEVERITIES
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import EvaluationTransform
from advprop_jax.errors import InputError

PACKAGE, VERSION = "imagecorruptions-imaug", "1.1.5"
SMALLEST = 32                                    # pixels a side that the package takes
OWN_SEED = ("impulse_noise", "glass_blur")       # the others draw from numpy's global generator
_GLOBAL_GENERATOR = threading.Lock()


def corrupt(image: np.ndarray, name: str, severity: int,
            seed: int | Sequence[int]) -> np.ndarray:
  """Corrupts one image; the same image, name, severity and seed give the same result anywhere.

  An image of less than 32 pixels is continued by its reflection, evenly on both sides, up to 32,
  and cut out again; contrast, fog, frost and zoom then see 32 pixels.

  The package draws from numpy's global generator, which is seeded for the call and put back. So
  threads take turns here, in vain: use processes for speed. No other thread may draw from that
  generator meanwhile; this project never does.

  Args:
    image: uint8 (h, w, 3), or a grey one, (h, w) or (h, w, 1), which becomes RGB. It is not
      written to.
    name: one of mce.CORRUPTIONS.
    severity: 1 to 5.
    seed: one or more integers, each 0 or more, such as (seed of the run, index of the image). Name
      and severity are mixed in.

  Returns:
    uint8 (h, w, 3).

  Raises:
    InputError: no such corruption or severity; the package is missing.
    ValueError: the image is of another shape or type.

  *Source:* Hendrycks & Dietterich, arXiv 1903.12261, section 4; PyPI imagecorruptions-imaug.
  """
  check_settings([(name, severity)])
  library, (padded, top, left) = _library(), _padded(_rgb(image))
  entropy = (*np.atleast_1d(seed).tolist(), CORRUPTIONS.index(name), severity)
  words = np.random.SeedSequence(entropy).generate_state(4)
  own_seed = {"seed": int(words[0])} if name in OWN_SEED else {}
  with _GLOBAL_GENERATOR:
    state = np.random.get_state()
    np.random.seed(words)
    try:
      result = library.corrupt(padded, severity, name, **own_seed)
    finally:
      np.random.set_state(state)
  height, width = image.shape[:2]
  return np.ascontiguousarray(result[top:top + height, left:left + width])


def corrupted(source: Source, transform: EvaluationTransform,
              settings: Sequence[tuple[str, int]] = SETTINGS, seed: int = 0,
              limit: int | None = None) -> Source:
  """The images of a source, corrupted in every one of the settings, as one long source.

  With n images, record i is image i % n under settings[i // n]: one pass with one set of workers
  goes through all of them, and batches["index"] says which is which. As in ImageNet-C the transform
  comes first; the loader's own then has to leave images as they are:

      batches = evaluation_batches(corrupted(source, evaluation_transform(224, 224 / 256)),
                                   batch_size=128, transform=evaluation_transform(224),
                                   num_workers=config.data.num_workers)

  What an image becomes hangs on seed, its index in `source`, corruption and severity alone: the
  settings may come in any order, or in several passes. Nothing is computed before it is read.

  Args:
    source: the records.
    transform: what comes before the corruption; it can be pickled.
    settings: (corruption, severity), each of mce.SETTINGS at most once; all 75 by default.
    seed: 0 or more.
    limit: only the first so many images.

  Returns:
    A source of len(settings) * n records, images uint8 (size, size, 3). It can be pickled; several
    threads may read it, but see `corrupt`.

  Raises:
    InputError: no such setting, or one given twice; a negative seed; the package is missing.
  """
  settings = tuple((name, severity) for name, severity in settings)      # of JSON they are lists
  check_settings(settings)
  if seed < 0:
    raise InputError(f"seed={seed} of the corruptions is negative: use 0 or more")
  _library()                           # to say here, not in a worker, that it is missing
  images = len(source) if limit is None else min(limit, len(source))
  return dataclasses.replace(
      source, records=CorruptedRecords(source, transform, settings, seed, images))


@dataclasses.dataclass(frozen=True)
class CorruptedRecords:
  """Record i is image i % images under settings[i // images], decoded and corrupted when read."""

  source: Source
  transform: EvaluationTransform
  settings: tuple[tuple[str, int], ...]
  seed: int
  images: int

  def __len__(self) -> int:
    return len(self.settings) * self.images

  def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
    setting, image = divmod(index, self.images)
    record = self.source[image]
    pixels = corrupt(self.transform(record["image"]), *self.settings[setting], (self.seed, image))
    return {"image": pixels, "label": record["label"]}


def check_settings(settings: Sequence[tuple[str, int]]) -> None:
  """Raises an InputError for an unknown corruption or severity, or a setting given twice."""
  for name, severity in settings:
    if name not in CORRUPTIONS:
      raise InputError(f"corruption {name!r} is unknown: use one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
      raise InputError(f"severity={severity!r} of corruption {name!r} is unknown: use 1 to 5")
  twice = sorted({setting for setting in settings if settings.count(setting) > 1})
  if twice:
    raise InputError(f"corruption {twice[0][0]!r} at severity {twice[0][1]} is given twice")


@functools.cache
def _library() -> ModuleType:
  try:
    # The original package has the same name for Python, but no seeds, and fails with numpy 2.
    importlib.metadata.version(PACKAGE)
    import imagecorruptions
  except ImportError as error:
    raise InputError(f"corruptions in memory need a package that cannot be imported ({error}): "
                     f"pip install {PACKAGE}=={VERSION}") from error
  return imagecorruptions


def _rgb(image: np.ndarray) -> np.ndarray:
  colours = image[..., None] if image.ndim == 2 else image
  if image.dtype != np.uint8 or colours.ndim != 3 or colours.shape[2] not in (1, 3):
    raise ValueError(f"expected uint8 (h, w, 3), got {image.dtype} {image.shape}")
  return np.broadcast_to(colours, (*colours.shape[:2], 3))


def _padded(image: np.ndarray) -> tuple[np.ndarray, int, int]:
  """The image, SMALLEST or more a side, and where in it its first row and column now are."""
  rows, columns = (max(SMALLEST - side, 0) for side in image.shape[:2])
  top, left = rows // 2, columns // 2
  if rows or columns:
    image = np.pad(image, ((top, rows - top), (left, columns - left), (0, 0)), mode="reflect")
  return image, top, left
