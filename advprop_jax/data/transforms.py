"""Images on the host: uint8 in, uint8 out; random ones take their generator.

No function writes to the image it is given; the result may be that image or a view of it.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from advprop_jax.data.autoaugment import autoaugment, randaugment
from advprop_jax.errors import InputError

TrainingTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
EvaluationTransform = Callable[[np.ndarray], np.ndarray]


def random_crop_with_padding(image: np.ndarray, size: int, padding: int,
                             rng: np.random.Generator) -> np.ndarray:
  """Cuts a square out of the image with a black border, each place equally likely.

  Args:
    image: uint8 (h, w, c), h and w at least size - 2 * padding.
    size: of the square, in pixels.
    padding: width of the border on each side, in pixels.
    rng: two draws: the top, then the left edge.

  Returns:
    uint8 (size, size, c).

  *Source:* He et al., "Deep Residual Learning", arXiv 1512.03385, section 4.2 (4 pixels).
  """
  height, width, channels = image.shape
  top = int(rng.integers(height + 2 * padding - size + 1)) - padding      # in image coordinates
  left = int(rng.integers(width + 2 * padding - size + 1)) - padding
  if 0 <= top <= height - size and 0 <= left <= width - size:
    return image[top:top + size, left:left + size]
  square = np.zeros((size, size, channels), np.uint8)
  inside = image[max(top, 0):top + size, max(left, 0):left + size]
  row, column = max(-top, 0), max(-left, 0)
  square[row:row + inside.shape[0], column:column + inside.shape[1]] = inside
  return square


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right with probability 1/2; one draw."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def fit(image: np.ndarray, size: int, crop_fraction: float = 1.0) -> np.ndarray:
  """Scales the image (bicubic, antialiased) and takes the central square.

  The shorter side is scaled to size / crop_fraction. An image of `size` is left as it is where all
  of it is shown.

  Args:
    image: uint8 (h, w, 3).
    size: of the result, in pixels.
    crop_fraction: side of the square / shorter side of the image, in (0, 1].

  Returns:
    uint8 (size, size, 3).

  *Source:* the rounding is that of timm, data/transforms_factory.py (scale_size), and of
  torchvision's Resize and CenterCrop.
  """
  height, width = image.shape[:2]
  shorter = scaled_side(size, crop_fraction)
  if min(height, width) == shorter == size and height == width:
    return image
  scaled_height, scaled_width = (max(shorter, int(shorter * side / min(height, width)))
                                 for side in (height, width))
  top, left = round((scaled_height - size) / 2), round((scaled_width - size) / 2)
  y, x = height / scaled_height, width / scaled_width
  # With a box Pillow gives what scaling it all and cropping then would, at the square's cost.
  return np.asarray(Image.fromarray(image).resize(
      (size, size), Image.Resampling.BICUBIC,
      box=(left * x, top * y, (left + size) * x, (top + size) * y)))


def scaled_side(size: int, crop_fraction: float) -> int:
  """The shorter side of an image of which `size` pixels are this fraction."""
  return int(size / crop_fraction + 1e-6)   # 240 / (240 / 272) may be a little below 272


def published_crop(size: int) -> float:
  """The crop_fraction that a network is published with, by its published image size.

  224 of 256 pixels and the like for networks for ImageNet; all of the image for those for small
  images.

  *Source:* tensorflow/tpu, models/official/efficientnet/preprocessing.py, CROP_PADDING.
  """
  return size / (size + 32) if size >= 200 else 1.0


def _none(image: np.ndarray, rng: np.random.Generator, *, size: int, padding: int) -> np.ndarray:
  del rng, padding
  return fit(image, size)


def _crop_flip(image: np.ndarray, rng: np.random.Generator, *, size: int,
               padding: int) -> np.ndarray:
  return random_flip(random_crop_with_padding(fit(image, size), size, padding, rng), rng)


def _autoaugment(image: np.ndarray, rng: np.random.Generator, *, size: int,
                 padding: int) -> np.ndarray:
  return autoaugment(_crop_flip(image, rng, size=size, padding=padding), rng)


def _randaugment(image: np.ndarray, rng: np.random.Generator, *, size: int,
                 padding: int) -> np.ndarray:
  return randaugment(_crop_flip(image, rng, size=size, padding=padding), rng)


# What `data.augment` names: (image, rng, *, size, padding) -> image (size, size, 3).
AUGMENTATIONS: dict[str, Callable[..., np.ndarray]] = {
  "none": _none,
  "crop_flip": _crop_flip,
  "autoaugment": _autoaugment,
  "randaugment": _randaugment,
}


def training_transform(image_size: int, augment: str = "crop_flip",
                       padding: int = 4) -> TrainingTransform:
  """What a training image goes through.

  Args:
    image_size: of the result, in pixels.
    augment: a name in AUGMENTATIONS: "crop_flip" for small images, "none" only fits the size;
      "autoaugment" and "randaugment" follow crop and flip.
    padding: of all but "none", in pixels.

  Returns:
    (uint8 (h, w, 3), generator) -> uint8 (image_size, image_size, 3). It can be pickled.

  Raises:
    InputError: no such augmentation, or a negative padding.
  """
  if augment not in AUGMENTATIONS:
    raise InputError(f"data.augment={augment!r} is unknown: use one of {sorted(AUGMENTATIONS)}")
  if padding < 0:
    raise InputError(f"data.padding={padding} is negative: use 0 or more pixels")
  return functools.partial(AUGMENTATIONS[augment], size=image_size, padding=padding)


def evaluation_transform(image_size: int, crop_fraction: float = 1.0) -> EvaluationTransform:
  """What a test image goes through: (uint8 (h, w, 3)) -> uint8 (image_size, image_size, 3)."""
  return functools.partial(fit, size=image_size, crop_fraction=crop_fraction)
