"""Crops, flip and fit against slow transcriptions, and how their randomness is spread."""

import math
import os
import pathlib
import pickle
import random

import numpy as np
import pytest
from PIL import Image

from advprop_jax.data import transforms
from advprop_jax.data.decode import BrokenImage, decode
from advprop_jax.errors import InputError
from tests.photographs import encode, opened, photograph


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
  """Random pixels, none of them black, so that a border can be told from the image."""
  return np.random.default_rng(seed).integers(1, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "size", "padding"), [
  (28, 28, 28, 4), (32, 32, 32, 0), (8, 8, 8, 7), (10, 13, 9, 2), (6, 6, 10, 2), (40, 30, 8, 1),
])
def test_crop_is_a_window_of_the_padded_image(height, width, size, padding):
  image = picture(height, width)
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  for seed in range(50):
    rng = np.random.default_rng(seed)
    top = rng.integers(height + 2 * padding - size + 1)
    left = rng.integers(width + 2 * padding - size + 1)
    crop = transforms.random_crop_with_padding(image, size, padding, np.random.default_rng(seed))
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, padded[top:top + size, left:left + size])


def test_each_place_of_the_crop_is_equally_likely():
  """Fails if the window can not reach one of the borders, or prefers the centre."""
  size, padding, draws = 8, 2, 5000
  image = picture(size, size)
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  places = {padded[y:y + size, x:x + size].tobytes(): (y, x) for y in range(5) for x in range(5)}
  counts = np.zeros((5, 5))
  rng = np.random.default_rng(1)
  for _ in range(draws):
    crop = transforms.random_crop_with_padding(image, size, padding, rng)
    counts[places[crop.tobytes()]] += 1
  chi_squared = np.sum((counts - draws / 25) ** 2) / (draws / 25)
  assert chi_squared < 51.2                                  # 24 degrees of freedom, p = 0.001


def test_flip_mirrors_columns_of_half_the_images():
  image, draws = picture(5, 7), 4000
  rng = np.random.default_rng(2)
  flipped = 0
  for _ in range(draws):
    result = transforms.random_flip(image, rng)
    mirrored = np.array_equal(result, np.stack([image[:, 6 - x] for x in range(7)], axis=1))
    assert mirrored or np.array_equal(result, image)
    flipped += mirrored
  assert abs(flipped - draws / 2) < 3 * np.sqrt(draws) / 2   # 3 standard errors


def torchvision_part(height: int, width: int, uniform, integer) -> tuple[int, int, int, int]:
  """Transcription of RandomResizedCrop.get_params: top, left, height, width.

  Args:
    height: of the image.
    width: of the image.
    uniform: (low, high) -> a draw.
    integer: n -> a draw out of 0..n-1.
  """
  scale, ratio = (0.08, 1.0), (3.0 / 4.0, 4.0 / 3.0)
  area = height * width
  log_ratio = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    target_area = area * uniform(scale[0], scale[1])
    aspect_ratio = math.exp(uniform(log_ratio[0], log_ratio[1]))
    w = round(math.sqrt(target_area * aspect_ratio))
    h = round(math.sqrt(target_area / aspect_ratio))
    if 0 < w <= width and 0 < h <= height:
      i = integer(height - h + 1)
      j = integer(width - w + 1)
      return i, j, h, w
  in_ratio = float(width) / float(height)
  if in_ratio < min(ratio):
    w = width
    h = round(w / min(ratio))
  elif in_ratio > max(ratio):
    h = height
    w = round(h * max(ratio))
  else:
    w = width
    h = height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [
  (375, 500), (500, 375), (7, 5), (1, 1), (30, 900), (900, 30), (1, 50), (50, 1)])
def test_random_parts_are_torchvision_s(height, width):
  """Catches ratio and area swapped, width for height, too few tries and another fallback."""
  fallbacks = 0
  for seed in range(300):
    rng, tries = np.random.default_rng(seed), []

    def uniform(low, high, rng=rng, tries=tries):
      tries.append(low)
      return rng.uniform(low, high)

    expected = torchvision_part(height, width, uniform, rng.integers)
    assert transforms.random_part(height, width, np.random.default_rng(seed)) == expected
    fallbacks += len(tries) == 20
  assert fallbacks > 100 or max(height, width) < 20 * min(height, width)   # they were tested too


def largest_gap(some, others) -> float:
  """The Kolmogorov-Smirnov statistic of two samples."""
  some, others = np.sort(some), np.sort(others)
  places = np.concatenate([some, others])
  return np.abs(np.searchsorted(some, places, "right") / len(some)
                - np.searchsorted(others, places, "right") / len(others)).max()


def describe(parts, height: int, width: int) -> dict[str, np.ndarray]:
  """Area, ratio, and the places as shares of what is free."""
  top, left, part_height, part_width = np.array(parts, float).T
  return {"area": part_height * part_width / (height * width), "ratio": part_width / part_height,
          "top": top / (height - part_height + 1), "left": left / (width - part_width + 1)}


def same_distribution(parts, others, height: int, width: int) -> None:
  """Fails where chance alone would with probability 0.001 for each of four properties."""
  parts, others = (describe(each, height, width) for each in (parts, others))
  for name, values in parts.items():
    size = 2 / len(values)                         # samples of one size
    assert largest_gap(values, others[name]) < 1.95 * math.sqrt(size), name


def test_random_parts_are_spread_like_torchvision_s():
  """Catches a generator that is drawn from twice, or draws that hang on each other."""
  height, width, number = 375, 500, 4000
  rng, other = np.random.default_rng(0), random.Random(1)
  parts = [transforms.random_part(height, width, rng) for _ in range(number)]
  others = [torchvision_part(height, width, other.uniform, other.randrange)
            for _ in range(number)]
  same_distribution(parts, others, height, width)
  found = describe(parts, height, width)
  assert 0.079 < found["area"].min() < 0.09
  assert found["area"].max() > 0.95
  assert 0.74 < found["ratio"].min() < 0.76
  assert 1.32 < found["ratio"].max() < 1.35


@pytest.mark.slow
def test_random_parts_are_spread_like_those_of_torchvision_itself():
  torchvision_transforms = pytest.importorskip("torchvision.transforms", reason="needs torchvision",
                                               exc_type=(ImportError, RuntimeError))
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  height, width, rng = 333, 500, np.random.default_rng(0)
  crop = torchvision_transforms.RandomResizedCrop(224)
  image = torch.zeros(3, height, width)
  others = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(20_000)]
  parts = [transforms.random_part(height, width, rng) for _ in range(20_000)]
  same_distribution(parts, others, height, width)


@pytest.fixture(params=["fast_image_resize", "Pillow"])
def resizer(request, monkeypatch):
  """The tests that use it run with cykooz-resizer, and as if it were not installed."""
  if request.param == "Pillow":
    monkeypatch.setattr(transforms, "cykooz_resizer", None)
  else:
    pytest.importorskip("cykooz_resizer")
  return request.param


def bicubic_weights(size: int, result: int) -> np.ndarray:
  """float64 (result, size): Keys' cubic of -1/2, as wide as it has to be to antialias."""
  scale = size / result
  stretch = max(scale, 1.0)
  weights = np.zeros((result, size))
  for row in range(result):
    distances = np.abs(np.arange(size) + 0.5 - (row + 0.5) * scale) / stretch
    near, far = distances < 1, (distances >= 1) & (distances < 2)
    weights[row, near] = (1.5 * distances**3 - 2.5 * distances**2 + 1)[near]
    weights[row, far] = (-0.5 * distances**3 + 2.5 * distances**2 - 4 * distances + 2)[far]
  return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("height", "width", "size"), [
  (300, 410, 224), (100, 90, 224), (224, 224, 224), (500, 160, 112)])
def test_resize_is_antialiased_bicubic(height, width, size, resizer):
  """Catches another filter, no antialiasing, a half pixel of shift, and height for width."""
  del resizer
  image = photograph(height, width)
  exact = np.einsum("yh,hwc,xw->yxc", bicubic_weights(height, size), image.astype(float),
                    bicubic_weights(width, size), optimize=True).clip(0, 255)
  error = np.abs(transforms.resize(image, size) - exact)
  assert error.mean() < 0.35                       # 0.25 is what rounding alone costs
  assert error.max() < 10                          # values between the passes are rounded, clipped


def test_random_resized_crop_is_the_part_scaled(resizer):
  image = photograph(190, 250)
  file = encode(image)
  for seed in range(12):
    result = transforms.random_resized_crop(file, 64, np.random.default_rng(seed))
    top, left, height, width = transforms.random_part(190, 250, np.random.default_rng(seed))
    expected = np.asarray(opened(file).crop((left, top, left + width, top + height))
                          .resize((64, 64), Image.Resampling.BICUBIC))
    assert (result.shape, result.dtype) == ((64, 64, 3), np.uint8)
    error = np.abs(result.astype(int) - expected)
    if resizer == "Pillow":
      assert not error.any()
    assert error.mean() < 0.4
    assert error.max() < 16
    np.testing.assert_array_equal(
      result, transforms.random_resized_crop(decode(file), 64, np.random.default_rng(seed)))


def test_large_photographs_lose_next_to_nothing_by_a_smaller_decoding(resizer, monkeypatch):
  """Catches a part that is not moved along with the scale: a pixel of shift costs far more."""
  del resizer
  factors, decode_at_least = [], transforms.decode_at_least
  monkeypatch.setattr(transforms, "decode_at_least", lambda *args: (
    result := decode_at_least(*args), factors.append(result[1]))[0])
  image = photograph(901, 1203)
  file = encode(image)
  for seed in range(12):
    seeded = [np.random.default_rng(seed) for _ in range(3)]
    result = transforms.random_resized_crop(file, 64, seeded[0]).astype(int)
    whole = transforms.random_resized_crop(decode(file), 64, seeded[1]).astype(int)
    _, _, height, width = transforms.random_part(901, 1203, seeded[2])
    assert min(height, width) / factors[-2] >= 2 * 64 or factors[-2] == 1
    error, shifted = (np.abs(each - whole).mean() for each in (result, np.roll(whole, 1, axis=1)))
    assert error < 1
    assert error < shifted / 4
  assert {2, 4} <= set(factors[::2])
  assert set(factors[1::2]) == {1}                 # arrays are what they are


def test_fit_leaves_an_image_of_the_right_size_alone():
  image = picture(28, 28)
  assert transforms.fit(image, 28) is image
  assert transforms.evaluation_transform(28)(image) is image


@pytest.mark.parametrize(("height", "width", "size", "scaled"), [
  (28, 28, 32, (32, 32)), (40, 30, 12, (16, 12)), (30, 40, 60, (60, 80)),
])
def test_fit_scales_the_shorter_side_and_crops_the_centre(height, width, size, scaled):
  image = picture(height, width)
  whole = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BICUBIC))
  top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
  np.testing.assert_array_equal(transforms.evaluation_transform(size)(image),
                                whole[top:top + size, left:left + size])


ODD_SIZES = [(375, 500), (500, 333), (256, 256), (224, 224), (225, 331), (401, 257), (100, 640),
             (1023, 101), (60, 47)]


def timm_fit(image: Image.Image, size: int, crop_fraction: float) -> np.ndarray:
  """timm's evaluation as Pillow alone does it: all of the image is scaled, then cropped."""
  scale_size = math.floor(size / crop_fraction)
  width, height = image.size
  short, long = min(width, height), max(width, height)
  new_long = int(scale_size * long / short)
  new_width, new_height = (scale_size, new_long) if width <= height else (new_long, scale_size)
  scaled = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
  top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
  return np.asarray(scaled.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(("size", "crop_fraction"), [(224, 0.875), (240, 240 / 272), (64, 1.0)])
@pytest.mark.parametrize(("height", "width"), ODD_SIZES)
def test_evaluation_is_timm_s(height, width, size, crop_fraction):
  """Catches other rounding of sizes and edges, and a smaller decoding, which is for training."""
  file = encode(photograph(height, width), subsampling=height % 3)
  result = transforms.evaluation_transform(size, crop_fraction)(file)
  np.testing.assert_array_equal(result, timm_fit(opened(file), size, crop_fraction))
  np.testing.assert_array_equal(
    transforms.evaluation_transform(size, crop_fraction)(decode(file)), result)


@pytest.mark.slow
def test_evaluation_is_that_of_timm_itself():
  """On photographs of ADVPROP_PHOTOS, a folder of JPEGs, if set; also scaled to odd sizes."""
  pytest.importorskip("torch", reason="needs torch, torchvision and timm")
  create_transform = pytest.importorskip(
    "timm.data", reason="needs torch, torchvision and timm", exc_type=(ImportError, RuntimeError)
  ).create_transform
  folder = os.environ.get("ADVPROP_PHOTOS")
  files = [path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.jp*g"))
           ] if folder else [encode(photograph(427, 640))]
  for size, crop_fraction in ((224, 0.875), (240, 0.882), (300, 0.904)):
    timm_s = create_transform((3, size, size), interpolation="bicubic", crop_pct=crop_fraction,
                              mean=(0, 0, 0), std=(1, 1, 1))
    for file in files:
      for shape in (None, *ODD_SIZES[::3]):
        some = file if shape is None else encode(opened(file).resize(shape[::-1]))
        expected = timm_s(opened(some)).numpy().transpose(1, 2, 0) * 255
        result = transforms.evaluation_transform(size, crop_fraction)(some)
        assert np.abs(result - expected).max() < 1.01


@pytest.mark.parametrize("crop", sorted(transforms.CROPS))
@pytest.mark.parametrize("augment", sorted(transforms.AUGMENTATIONS))
@pytest.mark.parametrize("shape", [(28, 28), (20, 33)])
def test_training_transform_gives_its_size_and_hangs_on_its_generator_only(augment, crop, shape):
  image = picture(*shape)
  image.flags.writeable = False                    # kept records are not to be written to
  before = image.copy()
  transform = pickle.loads(pickle.dumps(
    transforms.training_transform(28, augment, padding=3, crop=crop)))
  file = encode(image, "PNG")
  results = [transform(image, np.random.default_rng(seed)) for seed in (5, 6, 7, 8, 5)]
  assert {(result.shape, result.dtype) for result in results} == {((28, 28, 3), np.dtype("uint8"))}
  np.testing.assert_array_equal(results[0], results[-1])
  np.testing.assert_array_equal(image, before)
  np.testing.assert_array_equal(transform(file, np.random.default_rng(5)), results[0])
  different = len({result.tobytes() for result in results})
  assert different == 1 if augment == "none" else different > 1


@pytest.mark.parametrize("augment", ["crop_flip", "autoaugment", "randaugment"])
def test_the_order_is_crop_flip_augment(augment):
  """At the network's resolution: AutoAugment before the crop would see other pixels."""
  file = encode(photograph(90, 120))
  transform = transforms.training_transform(48, augment, crop="random_resized")
  for seed in range(8):
    rng = np.random.default_rng(seed)
    expected = transforms.random_flip(transforms.random_resized_crop(file, 48, rng), rng)
    expected = transforms.AUGMENTATIONS[augment](expected, rng)
    np.testing.assert_array_equal(transform(file, np.random.default_rng(seed)), expected)


def test_a_file_that_ends_early_is_an_error_of_every_transform():
  file = encode(photograph(90, 120))[:-500]
  rng = np.random.default_rng(0)
  for action in (transforms.evaluation_transform(32),
                 *(lambda file, crop=crop: transforms.training_transform(32, crop=crop)(file, rng)
                   for crop in transforms.CROPS)):
    with pytest.raises(BrokenImage, match="truncated"):
      action(file)


def test_crop_flip_pads_by_the_setting():
  image = picture(8, 8)
  crops = [transforms.training_transform(8, "crop_flip", padding=0)(image, rng)
           for rng in map(np.random.default_rng, range(20))]
  for crop in crops:
    assert np.array_equal(crop, image) or np.array_equal(crop, image[:, ::-1])


def test_bad_settings_are_one_sentence():
  with pytest.raises(InputError, match=r"data\.augment='mixup'.*'crop_flip', 'none', 'randaug"):
    transforms.training_transform(28, "mixup")
  with pytest.raises(InputError, match=r"data\.crop='centre'.*'pad', 'random_resized'"):
    transforms.training_transform(28, crop="centre")
  with pytest.raises(InputError, match=r"data\.padding=-1.*0 or more"):
    transforms.training_transform(28, "crop_flip", padding=-1)
