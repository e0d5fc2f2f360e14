"""Corruptions in memory: the same numbers whoever makes them, when, and in which order."""

import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from advprop_jax.benchmarks import corruptions
from advprop_jax.benchmarks.corruptions import corrupt, corrupted
from advprop_jax.benchmarks.mce import CORRUPTIONS, SETTINGS, SEVERITIES
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import evaluation_transform
from advprop_jax.errors import InputError
from tests.loading import batches_of_workers
from tests.photographs import encode, photograph

pytest.importorskip("imagecorruptions")

SMALL = 28
RANDOM = tuple(set(CORRUPTIONS) - {"defocus_blur", "zoom_blur", "brightness", "contrast",
                                   "pixelate", "jpeg_compression"})


@pytest.fixture(scope="module")
def image():
  return photograph(64, 64)


def source(images=4, size=SMALL, encoded=False):
  pixels = [photograph(size, size, seed) for seed in range(images)]
  records = [{"image": encode(image, "PNG") if encoded else image, "label": label}
             for label, image in enumerate(pixels)]
  return Source("photographs", "test", tuple(map(str, range(images))), records)


def distance(one, other):
  return np.abs(one.astype(float) - other).mean()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [SMALL, 64])
def test_every_setting_changes_the_image_and_repeats(name, size):
  image = photograph(size, size)
  before = image.copy()
  for severity in SEVERITIES:
    result = corrupt(image, name, severity, (0, 7))
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    assert distance(result, image) > 0.5
    np.testing.assert_array_equal(corrupt(image, name, severity, (0, 7)), result)
  np.testing.assert_array_equal(image, before)


def test_severity_raises_the_distance_of_most(image):
  rises = 0
  for name in CORRUPTIONS:
    # Where the corruption is drawn, one image says little.
    distances = [np.mean([distance(corrupt(image, name, severity, seed), image)
                          for seed in range(4)]) for severity in SEVERITIES]
    assert distances[4] > distances[0] or name == "frost", name
    rises += int(np.sum(np.diff(distances) > 0))
  assert rises >= 0.8 * len(CORRUPTIONS) * 4


def test_seed_and_index_and_severity_draw_anew(image):
  for name in RANDOM:
    results = [corrupt(image, name, 3, seed) for seed in (0, 1, (0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(results):
      for other in results[:i]:
        assert distance(one, other) > 0, name
  # Severities scale the same noise, if it is the same.
  weak, strong = (corrupt(np.full((64, 64, 3), 128, np.uint8), "gaussian_noise", s, 0) - 128.0
                  for s in (1, 2))
  assert abs(np.corrcoef(weak.ravel(), strong.ravel())[0, 1]) < 0.1


def test_global_generator_is_put_back(image):
  np.random.seed(5)
  expected = np.random.random(3)
  np.random.seed(5)
  for name in CORRUPTIONS:
    corrupt(image, name, 1, 0)
  np.testing.assert_array_equal(np.random.random(3), expected)


def test_threads_get_the_same(image):
  settings = [(name, severity) for name in RANDOM for severity in (1, 5)]
  expected = [corrupt(image, *setting, 0) for setting in settings]
  barrier = threading.Barrier(4)

  def work(turn):
    barrier.wait()
    return [corrupt(image, *setting, 0) for setting in settings[turn:] + settings[:turn]]

  with ThreadPoolExecutor(4) as pool:
    for turn, results in enumerate(pool.map(work, range(4))):
      np.testing.assert_array_equal(results, expected[turn:] + expected[:turn])


@pytest.mark.parametrize("shape", [(1, 1), (20, 50), (50, 20), (31, 33), (40, 47)])
def test_any_size(shape):
  image = photograph(64, 64)[:shape[0], :shape[1]]
  for name in CORRUPTIONS:
    assert corrupt(image, name, 5, 0).shape == (*shape, 3)


def test_small_images_are_cut_out_of_their_reflection():
  image = photograph(SMALL, 30)
  padded = np.pad(image, ((2, 2), (1, 1), (0, 0)), mode="reflect")
  for name in ("frost", "glass_blur", "contrast"):
    np.testing.assert_array_equal(corrupt(image, name, 2, 0),
                                  corrupt(padded, name, 2, 0)[2:-2, 1:-1])


def test_grey_images_become_rgb():
  grey = photograph(SMALL, SMALL)[..., 0]
  expected = corrupt(np.stack([grey] * 3, axis=-1), "snow", 1, 0)
  np.testing.assert_array_equal(corrupt(grey, "snow", 1, 0), expected)
  np.testing.assert_array_equal(corrupt(grey[..., None], "snow", 1, 0), expected)


def test_other_arrays_are_refused(image):
  for wrong in (image.astype(np.float32), image[..., :2], image[None]):
    with pytest.raises(ValueError, match=r"expected uint8 \(h, w, 3\)"):
      corrupt(wrong, "fog", 1, 0)


def test_source_goes_through_all_settings():
  images = source()
  everything = corrupted(images, evaluation_transform(SMALL))
  assert len(everything) == 75 * 4
  assert everything.class_names == images.class_names
  for index in (0, 3, 4, 123, 299):
    record = everything[index]
    setting, image = divmod(index, 4)
    assert record["label"] == image
    np.testing.assert_array_equal(
        record["image"], corrupt(images[image]["image"], *SETTINGS[setting], (0, image)))
  with pytest.raises(IndexError):
    everything[300]


def test_order_and_choice_of_settings_do_not_matter():
  images = source()
  settings = [["fog", 3], ["impulse_noise", 5], ["glass_blur", 1]]
  one = list(corrupted(images, evaluation_transform(SMALL), settings, seed=3))
  other = list(corrupted(images, evaluation_transform(SMALL), settings[::-1], seed=3, limit=2))
  assert len(other) == 6
  for index, record in enumerate(other):
    setting, image = divmod(index, 2)
    np.testing.assert_array_equal(record["image"], one[(2 - setting) * 4 + image]["image"])


def test_transform_comes_first():
  images = source(2, size=80, encoded=True)
  transform = evaluation_transform(64, 0.8)
  record = corrupted(images, transform, [("snow", 1)])[1]
  assert record["image"].shape == (64, 64, 3)
  np.testing.assert_array_equal(
      record["image"], corrupt(transform(images[1]["image"]), "snow", 1, (0, 1)))


def test_worker_processes_make_the_same_batches():
  # One of each kind of generator: numpy's, the package's own, numba's.
  settings = [("snow", 2), ("impulse_noise", 2), ("glass_blur", 2), ("gaussian_noise", 2)]
  everything = corrupted(source(), evaluation_transform(SMALL), settings)
  batches = batches_of_workers(everything, SMALL, 5)
  assert len(batches) == 4
  assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(20))


def test_source_can_be_pickled():
  everything = corrupted(source(), evaluation_transform(SMALL), [("frost", 1)])
  np.testing.assert_array_equal(
      pickle.loads(pickle.dumps(everything))[2]["image"], everything[2]["image"])


@pytest.mark.parametrize(("settings", "message"), [
  ([("rain", 1)], "corruption 'rain' is unknown: use one of gaussian_noise"),
  ([("speckle_noise", 1)], "'speckle_noise' is unknown"),
  ([("fog", 0)], "severity=0 of corruption 'fog' is unknown: use 1 to 5"),
  ([("fog", 1), ("fog", 2), ("fog", 1)], "'fog' at severity 1 is given twice"),
])
def test_unknown_settings_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    corrupted(source(), evaluation_transform(SMALL), settings)


def test_negative_seed_is_refused():
  with pytest.raises(InputError, match="seed=-1"):
    corrupted(source(), evaluation_transform(SMALL), seed=-1)


@pytest.mark.parametrize("what", ["package", "its name for Python"])
def test_missing_package_is_said(monkeypatch, what):
  if what == "package":
    monkeypatch.setattr(corruptions, "PACKAGE", "no-such-package")
  else:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
  corruptions._library.cache_clear()
  with pytest.raises(InputError, match=r"pip install .*==1\.1\.5$"):
    corrupted(source(), evaluation_transform(SMALL))
  corruptions._library.cache_clear()
