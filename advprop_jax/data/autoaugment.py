"""AutoAugment (policy v0) and RandAugment of uint8 images, all randomness from a generator.

*Source:* tensorflow/tpu, models/official/efficientnet/autoaugment.py, called the reference below:
its policy, its map from levels to arguments, its order of operations, grey where nothing is known
and nearest-neighbour sampling. Pillow does the work, to one grey level of the reference.
Different on purpose:
- Distances are parts of the image, not pixels. The reference moves by up to 250 pixels in
  AutoAugment, so that its strongest translation leaves nothing of an image of 224, and cuts out up
  to 80 in RandAugment; small images would be lost as well.
- Contrast blends with the mean grey level. The reference divides the sum of the histogram by 256
  in place of the mean, so that it blends with min(255, pixels / 256), whatever the image.
- Solarize at level 10 has the threshold 256 and changes nothing.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10
GREY = (128, 128, 128)
TRANSLATE = 150 / 331      # of the side at level 10; AutoAugment, arXiv 1805.09501, table 6
CUTOUT = 40 / 224          # of the shorter side at level 10: half the hole; the reference's 40


class Step(NamedTuple):
  """An operation, how likely it is, and its level: 0 to 10, not always weak to strong."""

  operation: str
  probability: float
  level: int


# The 25 sub-policies of v0, one of which an image gets. *Source:* the reference, policy_v0.
POLICY_V0: tuple[tuple[Step, Step], ...] = (
  (Step("Equalize", 0.8, 1), Step("ShearY", 0.8, 4)),
  (Step("Color", 0.4, 9), Step("Equalize", 0.6, 3)),
  (Step("Color", 0.4, 1), Step("Rotate", 0.6, 8)),
  (Step("Solarize", 0.8, 3), Step("Equalize", 0.4, 7)),
  (Step("Solarize", 0.4, 2), Step("Solarize", 0.6, 2)),
  (Step("Color", 0.2, 0), Step("Equalize", 0.8, 8)),
  (Step("Equalize", 0.4, 8), Step("SolarizeAdd", 0.8, 3)),
  (Step("ShearX", 0.2, 9), Step("Rotate", 0.6, 8)),
  (Step("Color", 0.6, 1), Step("Equalize", 1.0, 2)),
  (Step("Invert", 0.4, 9), Step("Rotate", 0.6, 0)),
  (Step("Equalize", 1.0, 9), Step("ShearY", 0.6, 3)),
  (Step("Color", 0.4, 7), Step("Equalize", 0.6, 0)),
  (Step("Posterize", 0.4, 6), Step("AutoContrast", 0.4, 7)),
  (Step("Solarize", 0.6, 8), Step("Color", 0.6, 9)),
  (Step("Solarize", 0.2, 4), Step("Rotate", 0.8, 9)),
  (Step("Rotate", 1.0, 7), Step("TranslateY", 0.8, 9)),
  (Step("ShearX", 0.0, 0), Step("Solarize", 0.8, 4)),
  (Step("ShearY", 0.8, 0), Step("Color", 0.6, 4)),
  (Step("Color", 1.0, 0), Step("Rotate", 0.6, 2)),
  (Step("Equalize", 0.8, 4), Step("Equalize", 0.0, 8)),
  (Step("Equalize", 1.0, 4), Step("AutoContrast", 0.6, 2)),
  (Step("ShearY", 0.4, 7), Step("SolarizeAdd", 0.6, 7)),
  (Step("Posterize", 0.8, 2), Step("Solarize", 0.6, 10)),
  (Step("Solarize", 0.6, 8), Step("Equalize", 0.6, 1)),
  (Step("Color", 0.8, 6), Step("Rotate", 0.4, 5)),
)

# What RandAugment draws from. *Source:* the reference, distort_image_with_randaugment.
RANDAUGMENT_OPERATIONS: tuple[str, ...] = (
  "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast",
  "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout",
  "SolarizeAdd",
)


def autoaugment(image: np.ndarray, rng: np.random.Generator, *,
                translate: float = TRANSLATE) -> np.ndarray:
  """One of the 25 sub-policies of v0, each as likely: two operations, each by its probability.

  Args:
    image: uint8 (h, w, 3); it is not written to.
    rng: the draws: the sub-policy; for each operation whether, and where it has one, its sign.
    translate: how far the strongest translation moves, as a part of the side; 250 / side is the
      reference's.

  Returns:
    uint8 (h, w, 3): `image` itself where no operation is drawn.

  *Source:* Cubuk et al., "AutoAugment", arXiv 1805.09501; the reference.
  """
  steps = [step for step in POLICY_V0[rng.integers(len(POLICY_V0))]
           if rng.random() < step.probability]
  if not steps:
    return image
  result = Image.fromarray(image)
  for step in steps:
    result = operate(result, step.operation, step.level, rng, translate=translate)
  return np.asarray(result)


def randaugment(image: np.ndarray, rng: np.random.Generator, num_layers: int = 2,
                magnitude: float = MAX_LEVEL, *, translate: float = TRANSLATE,
                cutout: float = CUTOUT) -> np.ndarray:
  """`num_layers` operations one after another, each equally likely, all of one level.

  Args:
    image: uint8 (h, w, 3); it is not written to.
    rng: the draws: for each layer the operation, and what it needs (sign, place).
    num_layers: N of the paper.
    magnitude: M of the paper, the level; it may be above 10 (17 for B5, 28 for B7).
    translate: how far level 10 moves, as a part of the side.
    cutout: half the side of the hole of level 10, as a part of the shorter side.

  Returns:
    uint8 (h, w, 3): `image` itself with no layers.

  *Source:* Cubuk et al., "RandAugment", arXiv 1909.13719; the reference and its flags (2, 10).
  """
  if not num_layers:
    return image
  result = Image.fromarray(image)
  for _ in range(num_layers):
    operation = RANDAUGMENT_OPERATIONS[rng.integers(len(RANDAUGMENT_OPERATIONS))]
    result = operate(result, operation, magnitude, rng, translate=translate, cutout=cutout)
  return np.asarray(result)


def operate(image: Image.Image, operation: str, level: float, rng: np.random.Generator, *,
            translate: float = TRANSLATE, cutout: float = CUTOUT) -> Image.Image:
  """One operation of a level.

  Args:
    image: RGB; it is not written to.
    operation: a name in RANDAUGMENT_OPERATIONS.
    level: 0 to 10; above 10 it goes on in proportion.
    rng: one draw for the sign of rotations, shears and translations, two for a hole's place.
    translate: at level 10, as a part of the side.
    cutout: at level 10, half the hole's side, as a part of the shorter side.

  Returns:
    RGB, of the same size.

  Raises:
    ValueError: no such operation.

  *Source:* the reference, level_to_arg.
  """
  share = level / MAX_LEVEL
  match operation:
    case "AutoContrast":
      return ImageOps.autocontrast(image)
    case "Equalize":
      return ImageOps.equalize(image)
    case "Invert":
      return ImageOps.invert(image)
    case "Posterize":
      return posterize(image, int(share * 4))
    case "Solarize":
      return ImageOps.solarize(image, int(share * 256))
    case "SolarizeAdd":
      return solarize_add(image, int(share * 110))
    case "Color" | "Contrast" | "Brightness" | "Sharpness":
      return getattr(ImageEnhance, operation)(image).enhance(share * 1.8 + 0.1)
    case "Rotate":
      return image.rotate(_sign(rng) * share * 30, Image.Resampling.NEAREST, fillcolor=GREY)
    case "ShearX":
      return shear(image, _sign(rng) * share * 0.3, 0)
    case "ShearY":
      return shear(image, 0, _sign(rng) * share * 0.3)
    case "TranslateX":
      return shift(image, _sign(rng) * share * translate * image.width, 0)
    case "TranslateY":
      return shift(image, 0, _sign(rng) * share * translate * image.height)
    case "Cutout":
      return cut_out(image, int(share * cutout * min(image.size)), rng)
  raise ValueError(f"no operation {operation!r}: use one of {RANDAUGMENT_OPERATIONS}")


def posterize(image: Image.Image, bits: int) -> Image.Image:
  """Keeps the highest bits of each value, and 1 where `bits` is 0.

  The reference shifts by 8 - bits, and TensorFlow clamps a shift of 8 to 7.
  *Source:* tensorflow/core/kernels/cwise_ops.h, right_shift_op.
  """
  return ImageOps.posterize(image, min(max(bits, 1), 8))


def solarize_add(image: Image.Image, addition: int) -> Image.Image:
  """Adds to the values under 128, up to 255; leaves the others."""
  table = [min(value + addition, 255) if value < 128 else value for value in range(256)]
  return image.point(table * 3)


def shear(image: Image.Image, along_x: float, along_y: float) -> Image.Image:
  """Result at (x, y) is the image at (x + along_x y, y + along_y x); the first pixel stays.

  Pillow would keep the corner of that pixel in place, the reference keeps its centre.
  """
  return _affine(image, (1, along_x, -along_x / 2, along_y, 1, -along_y / 2))


def shift(image: Image.Image, x: float, y: float) -> Image.Image:
  """Result at (column, row) is the image at (column + x, row + y), in pixels."""
  return _affine(image, (1, 0, x, 0, 1, y))


def cut_out(image: Image.Image, half: int, rng: np.random.Generator) -> Image.Image:
  """A grey square of side 2 half, in pixels, its centre anywhere in the image; two draws."""
  row, column = int(rng.integers(image.height)), int(rng.integers(image.width))
  result = image.copy()
  result.paste(GREY, (max(column - half, 0), max(row - half, 0),
                      min(column + half, image.width), min(row + half, image.height)))
  return result


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST,
                         fillcolor=GREY)


def _sign(rng: np.random.Generator) -> int:
  return 1 if rng.random() < 0.5 else -1
