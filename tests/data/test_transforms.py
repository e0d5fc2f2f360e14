"""Crop, flip and fit against slow transcriptions, and how their randomness is spread."""

import pickle

import numpy as np
import pytest
from PIL import Image

from advprop_jax.data import transforms
from advprop_jax.errors import InputError


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


@pytest.mark.parametrize("augment", sorted(transforms.AUGMENTATIONS))
@pytest.mark.parametrize("shape", [(28, 28), (20, 33)])
def test_training_transform_gives_its_size_and_hangs_on_its_generator_only(augment, shape):
  image = picture(*shape)
  image.flags.writeable = False                    # kept records are not to be written to
  before = image.copy()
  transform = pickle.loads(pickle.dumps(transforms.training_transform(28, augment, padding=3)))
  results = [transform(image, np.random.default_rng(seed)) for seed in (5, 6, 7, 8, 5)]
  assert {(result.shape, result.dtype) for result in results} == {((28, 28, 3), np.dtype("uint8"))}
  np.testing.assert_array_equal(results[0], results[-1])
  np.testing.assert_array_equal(image, before)
  different = len({result.tobytes() for result in results})
  assert different == 1 if augment == "none" else different > 1


def test_crop_flip_pads_by_the_setting():
  image = picture(8, 8)
  crops = [transforms.training_transform(8, "crop_flip", padding=0)(image, rng)
           for rng in map(np.random.default_rng, range(20))]
  for crop in crops:
    assert np.array_equal(crop, image) or np.array_equal(crop, image[:, ::-1])


def test_bad_settings_are_one_sentence():
  with pytest.raises(InputError, match=r"data\.augment='mixup'.*'crop_flip', 'none', 'randaug"):
    transforms.training_transform(28, "mixup")
  with pytest.raises(InputError, match=r"data\.padding=-1.*0 or more"):
    transforms.training_transform(28, "crop_flip", padding=-1)
