"""Images on the host: encoded or uint8 in, uint8 out; random ones take their generator.

No function writes to the image it is given; the result may be that image or a view of it.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from advprop_jax.data.autoaugment import autoaugment, randaugment
from advprop_jax.data.decode import decode, decode_at_least, size_of
from advprop_jax.errors import InputError

try:
  import cykooz_resizer
except ImportError:                    # no wheel for this machine
  cykooz_resizer = None

TrainingTransform = Callable[[np.ndarray | bytes, np.random.Generator], np.ndarray]
EvaluationTransform = Callable[[np.ndarray | bytes], np.ndarray]

AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10     # of a random-resized crop
ENOUGH = 2         # times the pixels of the result, in height and width, that are decoded at least


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


def random_resized_crop(image: np.ndarray | bytes, size: int,
                        rng: np.random.Generator) -> np.ndarray:
  """Cuts out a random part of random size and shape and makes a square of it (bicubic).

  A JPEG is decoded to a half, a quarter or an eighth of its sides where that leaves the part at
  least ENOUGH times the pixels of the result each way: for 224, parts from 896 pixels on. In the
  mean less than a grey level is lost by it (tests/benchmarks/decoders.py).

  Args:
    image: uint8 (h, w, 3), or an encoded one of any size.
    size: of the square, in pixels.
    rng: the draws are those of `random_part`.

  Returns:
    uint8 (size, size, 3).

  Raises:
    BrokenImage: it does not decode.
  """
  top, left, height, width = random_part(*size_of(image), rng)
  pixels, factor = decode_at_least(image, ENOUGH * size / min(height, width))
  if factor == 1:
    return resize(pixels[top:top + height, left:left + width], size)
  return resize(pixels, size, tuple(side / factor for side in (top, left, height, width)))


def random_part(height: int, width: int,
                rng: np.random.Generator) -> tuple[int, int, int, int]:
  """Draws a part of an image: area uniform in AREA, log of width / height uniform in log RATIO.

  Parts that do not fit in are drawn again, TRIES times in all; then it is the central one with the
  nearest ratio in RATIO.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    rng: two draws for each try, then the top and the left edge.

  Returns:
    Top, left, height and width of the part, in pixels.

  *Source:* Szegedy et al., "Going deeper with convolutions", arXiv 1409.4842, section 6;
  torchvision, transforms.RandomResizedCrop.get_params.
  """
  for _ in range(TRIES):
    area = height * width * rng.uniform(*AREA)
    ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < part_width <= width and 0 < part_height <= height:
      top, left = rng.integers(height - part_height + 1), rng.integers(width - part_width + 1)
      return int(top), int(left), part_height, part_width
  part_height = min(height, round(width / RATIO[0]))
  part_width = min(width, round(height * RATIO[1]))
  return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def resize(image: np.ndarray, size: int,
           box: tuple[float, float, float, float] | None = None) -> np.ndarray:
  """Scales an image to a square, bicubic with antialiasing, for training.

  By fast_image_resize, five times as fast as Pillow and as near to the filter's exact values (.29
  grey levels in the mean), but not the same bits: it scales columns first. Without it Pillow does.

  Args:
    image: uint8 (h, w, 3).
    size: of the result, in pixels.
    box: top, left, height and width of the part to scale, in pixels; all of it by default.

  Returns:
    uint8 (size, size, 3).
  """
  height, width = image.shape[:2]
  top, left, part_height, part_width = box or (0, 0, height, width)
  part_height, part_width = min(part_height, height - top), min(part_width, width - left)
  if cykooz_resizer is None:
    return np.asarray(Image.fromarray(image).resize(
        (size, size), Image.Resampling.BICUBIC,
        box=(left, top, left + part_width, top + part_height)))
  result = cykooz_resizer.ImageData(size, size, cykooz_resizer.PixelType.U8x3)
  options = cykooz_resizer.ResizeOptions(
      cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom),
      crop_box=box and cykooz_resizer.CropBox(left, top, part_width, part_height))
  # A Resizer serves one thread, and costs less to make than to keep.
  cykooz_resizer.Resizer().resize(cykooz_resizer.ImageData(
      width, height, cykooz_resizer.PixelType.U8x3, image.tobytes()), result, options)
  return np.frombuffer(result.get_buffer(), np.uint8).reshape(size, size, 3)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right with probability 1/2; one draw."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def fit(image: np.ndarray | bytes, size: int, crop_fraction: float = 1.0) -> np.ndarray:
  """Scales the image (bicubic, antialiased) and takes the central square.

  The shorter side is scaled to size / crop_fraction. An image of `size` is left as it is where all
  of it is shown.

  Args:
    image: uint8 (h, w, 3), or an encoded one, which is decoded whole.
    size: of the result, in pixels.
    crop_fraction: side of the square / shorter side of the image, in (0, 1].

  Returns:
    uint8 (size, size, 3).

  Raises:
    BrokenImage: it does not decode.

  *Source:* the rounding is that of timm, data/transforms_factory.py (scale_size), and of
  torchvision's Resize and CenterCrop.
  """
  image = decode(image)
  height, width = image.shape[:2]
  shorter = scaled_side(size, crop_fraction)
  if min(height, width) == shorter == size and height == width:
    return image
  scaled_height, scaled_width = (max(shorter, int(shorter * side / min(height, width)))
                                 for side in (height, width))
  top, left = round((scaled_height - size) / 2), round((scaled_width - size) / 2)
  # Scaling just the square, by Pillow's `box`, would be a third cheaper, but differ by two levels.
  scaled = Image.fromarray(image).resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
  return np.asarray(scaled.crop((left, top, left + size, top + size)))


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


def _padded(image: np.ndarray | bytes, size: int, padding: int,
            rng: np.random.Generator) -> np.ndarray:
  return random_crop_with_padding(fit(image, size), size, padding, rng)


def _random_resized(image: np.ndarray | bytes, size: int, padding: int,
                    rng: np.random.Generator) -> np.ndarray:
  del padding
  return random_resized_crop(image, size, rng)


def _as_it_is(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  del rng
  return image


# What `data.crop` names: (image, size, padding, rng) -> image (size, size, 3).
CROPS: dict[str, Callable[..., np.ndarray]] = {
  "pad": _padded,
  "random_resized": _random_resized,
}

# What `data.augment` names: what follows crop and flip. With "none" there are no such two.
AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  "none": _as_it_is,
  "crop_flip": _as_it_is,
  "autoaugment": autoaugment,
  "randaugment": randaugment,
}


def training_transform(image_size: int, augment: str = "crop_flip", padding: int = 4,
                       crop: str = "pad") -> TrainingTransform:
  """What a training image goes through: crop, flip, augmentation, the latter two at `image_size`.

  Args:
    image_size: of the result, in pixels.
    augment: a name in AUGMENTATIONS: "crop_flip", or "autoaugment" and "randaugment", which follow
      crop and flip; "none" only fits the size.
    padding: of the crop "pad", in pixels.
    crop: a name in CROPS: "pad" for small images, which fits the size before, or "random_resized"
      for photographs.

  Returns:
    (uint8 (h, w, 3) or encoded, generator) -> uint8 (image_size, image_size, 3). It can be
    pickled, and raises a BrokenImage for one that does not decode.

  Raises:
    InputError: no such augmentation or crop, or a negative padding.
  """
  for name, value, known in (("augment", augment, AUGMENTATIONS), ("crop", crop, CROPS)):
    if value not in known:
      raise InputError(f"data.{name}={value!r} is unknown: use one of {sorted(known)}")
  if padding < 0:
    raise InputError(f"data.padding={padding} is negative: use 0 or more pixels")
  return functools.partial(_train, size=image_size, augment=augment, padding=padding, crop=crop)


def _train(image: np.ndarray | bytes, rng: np.random.Generator, *, size: int, augment: str,
           padding: int, crop: str) -> np.ndarray:
  if augment == "none":
    return fit(image, size)
  return AUGMENTATIONS[augment](random_flip(CROPS[crop](image, size, padding, rng), rng), rng)


def evaluation_transform(image_size: int, crop_fraction: float = 1.0) -> EvaluationTransform:
  """What a test image goes through: uint8 (h, w, 3) or encoded -> uint8 (size, size, 3)."""
  return functools.partial(fit, size=image_size, crop_fraction=crop_fraction)
