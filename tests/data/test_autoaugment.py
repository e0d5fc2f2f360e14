"""Each operation against numpy written from its formula, the policies against their tables."""

import collections
import math

import numpy as np
import pytest
from PIL import Image

from advprop_jax.data.autoaugment import operate

SHAPES = [(28, 28), (32, 32), (224, 224), (30, 47)]

def picture(height: int, width: int, low: int = 0, high: int = 256, seed: int = 0) -> np.ndarray:
  """Noise of low to high - 1, each channel with its own distribution."""
  noise = np.random.default_rng(seed).random((height, width, 3)) ** (1, 1.5, 0.7)
  return (low + noise * (high - low)).astype(np.uint8)


def run(image: np.ndarray, operation: str, level: float, seed: int = 0, **extents) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return np.asarray(operate(Image.fromarray(image), operation, level, rng, **extents))


def luma(image: np.ndarray) -> np.ndarray:
  return image.astype(int) @ (299, 587, 114) / 1000                     # ITU-R 601-2


def assert_blend(result: np.ndarray, degenerate: np.ndarray, image: np.ndarray,
                 factor: float) -> None:
  """The whole part of degenerate + factor (image - degenerate), but for float32's last bits."""
  mixed = degenerate + factor * (image.astype(float) - degenerate)
  assert np.all(np.floor(np.clip(mixed - 1e-3, 0, 255)) <= result)
  assert np.all(result <= np.floor(np.clip(mixed + 1e-3, 0, 255)))


# (level, what the reference makes of it), by hand.
@pytest.mark.parametrize(("level", "kept"), [
  (0, 1), (2, 1), (3, 1), (5, 2), (6, 2), (8, 3), (10, 4), (17, 6), (28, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_posterize_keeps_the_highest_bits(shape, level, kept):
  image = picture(*shape)
  width = 2 ** (8 - kept)
  np.testing.assert_array_equal(run(image, "Posterize", level), image // width * width)


@pytest.mark.parametrize(("level", "threshold"), [
  (0, 0), (2, 51), (3, 76), (4, 102), (8, 204), (10, 256), (17, 435)])
@pytest.mark.parametrize("shape", SHAPES)
def test_solarize_inverts_from_the_threshold(shape, level, threshold):
  image = picture(*shape)
  expected = image.copy()
  expected[image >= threshold] ^= 255
  np.testing.assert_array_equal(run(image, "Solarize", level), expected)


@pytest.mark.parametrize(("level", "addition"), [(0, 0), (3, 33), (7, 77), (10, 110), (28, 308)])
@pytest.mark.parametrize("shape", SHAPES)
def test_solarize_add_lifts_the_darker_half(shape, level, addition):
  image = picture(*shape)
  expected = np.where(image // 128, image, np.minimum(image.astype(int) + addition, 255))
  np.testing.assert_array_equal(run(image, "SolarizeAdd", level), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_invert(shape):
  image = picture(*shape)
  np.testing.assert_array_equal(run(image, "Invert", 9), ~image)


@pytest.mark.parametrize(("low", "high"), [(0, 256), (30, 200), (90, 94), (128, 129)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equalize_is_the_number_of_darker_pixels_in_steps(shape, low, high):
  """The published form: a value becomes (darker pixels + step // 2) // step, in each channel."""
  image = picture(*shape, low, high)
  expected = image.copy()
  for channel in range(3):
    values = image[..., channel]
    step = np.sum(values < values.max()) // 255
    if step:
      for value in range(256):
        darker = np.sum(values < value)
        expected[values == value, channel] = min((darker + step // 2) // step, 255)
  np.testing.assert_array_equal(run(image, "Equalize", 4), expected)


@pytest.mark.parametrize(("low", "high"), [(0, 256), (30, 200), (90, 94), (128, 129)])
@pytest.mark.parametrize("shape", SHAPES)
def test_autocontrast_stretches_each_channel(shape, low, high):
  image = picture(*shape, low, high).astype(int)
  image[0, 0] = low, low + 1, low                          # the channels differ in their darkest
  darkest, brightest = image.min((0, 1)), image.max((0, 1))
  extent = np.maximum(brightest - darkest, 1)
  scaled = (image - darkest) * 255
  expected = np.where(brightest > darkest, scaled // extent, image)
  result = run(image.astype(np.uint8), "AutoContrast", 7).astype(int)
  # A product that is a whole number may be rounded to just under it.
  whole = (scaled % extent == 0) & (brightest > darkest)
  np.testing.assert_array_equal(result[~whole], expected[~whole])
  assert np.all((expected - result)[whole] <= 1)
  assert np.all(result <= expected)


ENHANCEMENTS = [(0, 0.1), (1, 0.28), (4, 0.82), (9, 1.72), (10, 1.9), (28, 5.14)]


@pytest.mark.parametrize(("level", "factor"), ENHANCEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_color_blends_with_grey(shape, level, factor):
  image = picture(*shape)
  grey = luma(image)[..., None] + 0.5
  clear = np.abs(grey - np.round(grey))[..., 0] > 0.005    # the weights have 16 bits in Pillow
  assert clear.mean() > 0.95
  assert_blend(run(image, "Color", level)[clear], np.floor(grey)[clear], image[clear], factor)


@pytest.mark.parametrize(("level", "factor"), ENHANCEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_contrast_blends_with_the_mean_grey_level(shape, level, factor):
  image = picture(*shape, 20, 250)
  mean = np.floor(np.floor(luma(image) + 0.5).mean() + 0.5)
  assert_blend(run(image, "Contrast", level), mean, image, factor)


@pytest.mark.parametrize(("level", "factor"), ENHANCEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_brightness_blends_with_black(shape, level, factor):
  image = picture(*shape)
  assert_blend(run(image, "Brightness", level), np.zeros(()), image, factor)


@pytest.mark.parametrize(("level", "factor"), ENHANCEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sharpness_blends_with_a_smoothed_image(shape, level, factor):
  """1/13 of the 3x3 neighbourhood, the centre five times; the border as it was."""
  image = picture(*shape)
  smooth = image.astype(int)
  windows = np.lib.stride_tricks.sliding_window_view(smooth, (3, 3), (0, 1)).sum((-2, -1))
  smooth[1:-1, 1:-1] = (2 * (windows + 4 * smooth[1:-1, 1:-1]) + 13) // 26         # rounded
  assert_blend(run(image, "Sharpness", level), smooth, image, factor)


def sample(image: np.ndarray, source_x: np.ndarray, source_y: np.ndarray):
  """Nearest pixel, grey outside; and where the nearest is so by more than Pillow's fixed point."""
  height, width = image.shape[:2]
  x, y = np.floor(source_x + 0.5).astype(int), np.floor(source_y + 0.5).astype(int)
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  expected = np.full_like(image, 128)
  expected[inside] = image[y[inside], x[inside]]
  clear = np.all([np.abs(place + 0.5 - np.round(place + 0.5)) > 0.005
                  for place in (source_x, source_y)], axis=0)
  return expected, clear


def move(image: np.ndarray, operation: str, size: float):
  """What `operation` by `size` (degrees, slope or pixels) should give, and where that is clear."""
  height, width = image.shape[:2]
  y, x = np.mgrid[:height, :width].astype(float)
  match operation:
    case "ShearX":
      return sample(image, x + size * y, y)
    case "ShearY":
      return sample(image, x, y + size * x)
    case "TranslateX":
      return sample(image, x + size, y)
    case "TranslateY":
      return sample(image, x, y + size)
  angle = math.radians(size)
  x, y = x - (width - 1) / 2, y - (height - 1) / 2                 # about the centre
  return sample(image, math.cos(angle) * x - math.sin(angle) * y + (width - 1) / 2,
                math.sin(angle) * x + math.cos(angle) * y + (height - 1) / 2)


@pytest.mark.parametrize(("operation", "level", "size"), [
  ("Rotate", 2, 6), ("Rotate", 8, 24), ("Rotate", 10, 30), ("Rotate", 28, 84),
  ("ShearX", 4, 0.12), ("ShearX", 9, 0.27), ("ShearX", 10, 0.3),
  ("ShearY", 4, 0.12), ("ShearY", 9, 0.27), ("ShearY", 10, 0.3),
])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_shear_sample_the_nearest_pixel(shape, operation, level, size):
  image = picture(*shape)
  agree = set()
  for seed in range(8):
    result = run(image, operation, level, seed)
    for sign in (1, -1):
      expected, clear = move(image, operation, sign * size)
      assert clear.mean() > 0.85                           # a slope of 0.3 has many ties
      if np.array_equal(result[clear], expected[clear]):
        agree.add((seed, sign))
  assert {seed for seed, _ in agree} == set(range(8))
  assert {sign for _, sign in agree} == {1, -1}


@pytest.mark.parametrize(("operation", "axis"), [("TranslateX", 1), ("TranslateY", 0)])
@pytest.mark.parametrize(("level", "translate"), [(1, None), (9, None), (4, 0.3), (9, 1.2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_translation_is_a_part_of_its_own_side(shape, level, translate, operation, axis):
  image = picture(*shape)
  pixels = level * (150 / 331 if translate is None else translate) / 10 * shape[axis]
  extents = {} if translate is None else {"translate": translate}
  expected = [np.full_like(image, 128) for _ in range(2)]
  whole = math.floor(pixels + 0.5)
  kept = np.arange(shape[axis] - whole)
  for result, here, there in ((expected[0], kept, kept + whole), (expected[1], kept + whole, kept)):
    index = (slice(None),) * axis
    result[(*index, here)] = image[(*index, there)]
  results = [run(image, operation, level, seed, **extents) for seed in range(8)]
  assert {result.tobytes() for result in results} == {result.tobytes() for result in expected}


@pytest.mark.parametrize("operation", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_signs_are_equally_likely(operation):
  image, draws = picture(9, 11), 2000
  counts = collections.Counter(run(image, operation, 9, seed).tobytes() for seed in range(draws))
  assert len(counts) == 2
  assert abs(min(counts.values()) - draws / 2) < 3 * math.sqrt(draws) / 2       # 3 standard errors


def test_cutout_has_its_centre_anywhere():
  image, half, draws = picture(7, 9, high=128), 2, 6300
  places = {}
  for row in range(7):
    for column in range(9):
      y, x = np.mgrid[:7, :9]
      hole = (y >= row - half) & (y < row + half) & (x >= column - half) & (x < column + half)
      places[np.where(hole[..., None], 128, image).astype(np.uint8).tobytes()] = row, column
  assert len(places) == 63
  rng = np.random.default_rng(3)
  counts = collections.Counter(
    places[np.asarray(operate(Image.fromarray(image), "Cutout", 7, rng, cutout=0.45)).tobytes()]
    for _ in range(draws))                                  # int(0.7 * 0.45 * 7) is 2
  chi_squared = sum((counts[place] - 100) ** 2 / 100 for place in places.values())
  assert chi_squared < 102.2                                # 62 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("shape", "level", "half"), [
  ((224, 224), 10, 40), ((224, 300), 5, 20), ((28, 28), 10, 5), ((47, 30), 10, 5)])
def test_cutout_is_a_part_of_the_shorter_side(shape, level, half):
  image = picture(*shape, high=128)
  holes = {np.sum(run(image, "Cutout", level, seed)[..., 0] == 128) for seed in range(60)}
  assert max(holes) == 4 * half * half


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operation", "level"), [
  ("Rotate", 0), ("ShearX", 0), ("ShearY", 0), ("TranslateX", 0), ("TranslateY", 0),
  ("Cutout", 0), ("SolarizeAdd", 0), ("Solarize", 10), ("Posterize", 20), ("Color", 5),
  ("Contrast", 5), ("Brightness", 5), ("Sharpness", 5),
])
def test_levels_that_change_nothing(operation, level, shape):
  image = picture(*shape)
  np.testing.assert_array_equal(run(image, operation, level), image)
