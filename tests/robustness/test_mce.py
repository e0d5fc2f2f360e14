"""mCE of ImageNet-C, against what is published."""

import math

import numpy as np
import pytest

from advprop_jax.benchmarks import mce
from advprop_jax.benchmarks.mce import ALEXNET, CORRUPTIONS, SETTINGS, SEVERITIES
from advprop_jax.errors import InputError

# Errors of AlexNet, percent, in the order of CORRUPTIONS and SEVERITIES. *Source:* timm's table.
ALEXNET_ERRORS = (
  (69.528, 82.542, 93.554, 98.138, 99.452),
  (71.224, 85.108, 93.574, 98.182, 99.146),
  (78.374, 89.808, 94.870, 98.720, 99.548),
  (65.624, 73.202, 85.036, 91.364, 94.714),
  (64.308, 75.054, 88.806, 91.622, 93.344),
  (58.430, 70.048, 82.108, 89.750, 92.638),
  (70.008, 76.992, 80.784, 84.198, 87.198),
  (71.726, 88.392, 86.468, 91.870, 94.952),
  (61.390, 79.734, 88.790, 89.942, 93.430),
  (67.474, 76.050, 84.378, 87.260, 94.500),
  (45.140, 48.502, 54.048, 62.166, 72.440),
  (64.548, 76.150, 88.874, 97.760, 99.270),
  (52.596, 70.116, 55.686, 64.076, 80.554),
  (52.218, 54.620, 73.728, 87.092, 91.262),
  (51.002, 54.718, 57.294, 65.458, 74.778),
)
# Mean accuracy over the severities and CE of torchvision's first ResNet-50, percent, 76.13 on clean
# images. *Source:* bethgelab/game-of-noise, Results/clean_results.txt (commit f220bd4).
RESNET_50 = {
  "brightness": (68.02, 56.64),
  "contrast": (39.06, 71.43),
  "defocus_blur": (38.75, 74.71),
  "elastic_transform": (45.25, 84.75),
  "fog": (45.83, 66.11),
  "frost": (38.14, 74.84),
  "gaussian_noise": (29.29, 79.77),
  "glass_blur": (26.79, 88.61),
  "impulse_noise": (23.81, 82.58),
  "jpeg_compression": (53.41, 76.82),
  "motion_blur": (38.67, 78.03),
  "pixelate": (44.79, 76.92),
  "shot_noise": (27.03, 81.58),
  "snow": (32.53, 77.83),
  "zoom_blur": (36.24, 79.86),
}


def at_every_severity(means):
  return {name: dict.fromkeys(SEVERITIES, error) for name, error in means.items()}


def resnet_50():
  return at_every_severity({name: 1 - accuracy / 100 for name, (accuracy, _) in RESNET_50.items()})


def alexnet():
  return {name: dict(zip(SEVERITIES, (error / 100 for error in row), strict=True))
          for name, row in zip(CORRUPTIONS, ALEXNET_ERRORS, strict=True)}


def test_settings():
  assert CORRUPTIONS == (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression")
  assert len(SETTINGS) == len(set(SETTINGS)) == 75
  assert SETTINGS[:6] == (*(("gaussian_noise", s) for s in SEVERITIES), ("shot_noise", 1))


def test_alexnet_has_100():
  errors = at_every_severity(ALEXNET)
  assert mce.mce(errors) == 100.0
  assert set(mce.corruption_errors(errors).values()) == {100.0}
  assert mce.relative_mce(errors, mce.ALEXNET_CLEAN) == 100.0


def test_constants_are_the_means_of_alexnets_table():
  for name, row in zip(CORRUPTIONS, ALEXNET_ERRORS, strict=True):
    assert math.fsum(row) / 5 == pytest.approx(100 * ALEXNET[name], abs=1e-9)
  assert mce.mce(alexnet()) == pytest.approx(100, abs=1e-9)


def test_resnet_50_has_what_is_published():
  errors = resnet_50()
  assert round(mce.mce(errors), 1) == 76.7
  for name, value in mce.corruption_errors(errors).items():
    assert value == pytest.approx(RESNET_50[name][1], abs=0.02), name     # of rounded accuracies
  assert mce.mean_error(errors) == pytest.approx(1 - 0.3917, abs=1e-4)


def test_relative_mce_of_resnet_50():
  relative = [(1 - RESNET_50[name][0] / 100 - 0.2387) / (ALEXNET[name] - 0.4348)
              for name in CORRUPTIONS]
  assert mce.relative_mce(resnet_50(), 0.2387) == pytest.approx(100 * np.mean(relative))
  assert round(mce.relative_mce(resnet_50(), 0.2387)) == 105


def test_as_by_numpy():
  errors = np.random.default_rng(0).uniform(0.2, 0.9, (15, 5))
  given = {name: dict(zip(SEVERITIES, row.tolist(), strict=True))
           for name, row in zip(CORRUPTIONS, errors, strict=True)}
  alexnet_means = np.array(list(ALEXNET.values()))
  assert mce.mce(given) == pytest.approx(100 * (errors.mean(1) / alexnet_means).mean())
  relative = (errors - 0.2).mean(1) / (alexnet_means - 0.43)
  assert mce.relative_mce(given, 0.2, 0.43) == pytest.approx(100 * relative.mean())
  assert mce.mean_error(given) == pytest.approx(errors.mean())


def test_further_corruptions_do_not_count():
  errors = at_every_severity({**ALEXNET, "speckle_noise": 0.1})
  assert mce.mce(errors) == 100.0


def test_what_is_missing_is_named_and_mce_refused():
  errors = resnet_50()
  del errors["frost"], errors["fog"][2], errors["fog"][5]
  assert len(mce.missing(errors)) == 7
  for refusing in (mce.mce, mce.mean_error,
                   lambda errors: mce.relative_mce(errors, 0.24)):
    with pytest.raises(InputError, match=r"missing: frost; fog at severity 2, 5$"):
      refusing(errors)
  shown = mce.corruption_errors(errors)
  assert set(CORRUPTIONS) - set(shown) == {"frost", "fog"}
  assert list(mce.relative_corruption_errors(errors, 0.24)) == list(shown)


@pytest.mark.parametrize("value", [68.02, -0.1, math.nan])
def test_an_error_is_a_fraction(value):
  errors = resnet_50()
  errors["snow"][3] = value
  with pytest.raises(InputError, match="snow at severity 3 is no fraction"):
    mce.mce(errors)
  with pytest.raises(InputError, match="clean images is no fraction"):
    mce.relative_mce(resnet_50(), value)


def test_standard_error():
  assert mce.standard_error(0.5, 100) == pytest.approx(0.05)
  assert mce.standard_error(0.0, 10) == 0
  with pytest.raises(InputError, match="images=0"):
    mce.standard_error(0.5, 0)
