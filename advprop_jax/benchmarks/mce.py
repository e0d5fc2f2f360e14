"""ImageNet-C in numbers: errors of 15 corruptions at 5 severities, and AlexNet's, make the mCE.

Errors are top-1 errors, fractions in [0, 1]; what is divided by AlexNet's is in percent, as
published. Only the 15 corruptions count: the four that were released as extra ones are no part of
a published mCE, and other averages (of 19, or not divided) do not compare to it.

*Source:* Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261, section 4.
"""

import itertools
import math
from collections.abc import Mapping

from advprop_jax.errors import InputError

Errors = Mapping[str, Mapping[int, float]]       # corruption -> severity -> error

# AlexNet's mean errors over the five severities, in the paper's order of the corruptions. *Source:*
# timm's and OpenMMLab's tables (imagenetc_alexnet_error_rates_list; mmcls, get_ce_alexnet), which
# agree; rounded, the paper's appendix C.
ALEXNET: dict[str, float] = {
  "gaussian_noise": 0.886428,
  "shot_noise": 0.894468,
  "impulse_noise": 0.922640,
  "defocus_blur": 0.819880,
  "glass_blur": 0.826268,
  "motion_blur": 0.785948,
  "zoom_blur": 0.798360,
  "snow": 0.866816,
  "frost": 0.826572,
  "fog": 0.819324,
  "brightness": 0.564592,
  "contrast": 0.853204,
  "elastic_transform": 0.646056,
  "pixelate": 0.717840,
  "jpeg_compression": 0.606500,
}
# *Source:* google-research/robustness_metrics, reports/imagenet_variants.py; torchvision's weights
# of AlexNet, which the paper used, state an accuracy of 56.522.
ALEXNET_CLEAN = 0.4348

CORRUPTIONS: tuple[str, ...] = tuple(ALEXNET)
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
SETTINGS: tuple[tuple[str, int], ...] = tuple(itertools.product(CORRUPTIONS, SEVERITIES))   # the 75


def mce(errors: Errors) -> float:
  """Mean corruption error: the mean over the 15 corruptions of error / AlexNet's, in percent.

  Args:
    errors: of all 75 settings, fractions; further corruptions are ignored.

  Returns:
    100.0 for AlexNet, 76.7 for torchvision's first ResNet-50.

  Raises:
    InputError: a corruption or severity is missing (all are named), or an error is no fraction.

  *Source:* section 4.1 of the paper: CE = sum over severities / AlexNet's sum; mCE, their mean.
  """
  _refuse_missing("mCE", errors)
  return _mean(corruption_errors(errors))


def relative_mce(errors: Errors, clean_error: float,
                 alexnet_clean: float = ALEXNET_CLEAN) -> float:
  """Relative mCE: as `mce`, of what a corruption adds to the error on clean images; in percent.

  Args:
    errors: of all 75 settings, fractions; further corruptions are ignored.
    clean_error: the network's error on ImageNet's validation images, a fraction.
    alexnet_clean: AlexNet's.

  Returns:
    100.0 for AlexNet. It is low for a network that is bad on clean images as well: read it beside
    the mCE.

  Raises:
    InputError: a corruption or severity is missing (all are named), or an error is no fraction.

  *Source:* section 4.1 of the paper; google-research/robustness_metrics has the same formula.
  """
  _refuse_missing("relative mCE", errors)
  return _mean(relative_corruption_errors(errors, clean_error, alexnet_clean))


def mean_error(errors: Errors) -> float:
  """Mean of the 75 errors, not divided by AlexNet's: a fraction, and for any data set.

  Raises:
    InputError: a corruption or severity is missing (all are named), or an error is no fraction.
  """
  _refuse_missing("mean corrupted error", errors)
  return math.fsum(_sums(errors).values()) / len(SETTINGS)


def corruption_errors(errors: Errors) -> dict[str, float]:
  """CE, in percent, of each of the 15 corruptions of which all five severities are there.

  Raises:
    InputError: an error is no fraction.
  """
  return {name: 100 * (total / (len(SEVERITIES) * ALEXNET[name]))
          for name, total in _sums(errors).items()}


def relative_corruption_errors(errors: Errors, clean_error: float,
                               alexnet_clean: float = ALEXNET_CLEAN) -> dict[str, float]:
  """Relative CE, in percent, of each corruption of which all five severities are there.

  Args:
    errors: fractions.
    clean_error: the network's error on ImageNet's validation images, a fraction.
    alexnet_clean: AlexNet's.

  Raises:
    InputError: an error is no fraction.
  """
  number = len(SEVERITIES)
  ours, theirs = (number * _fraction(error, "clean images")
                  for error in (clean_error, alexnet_clean))
  return {name: 100 * ((total - ours) / (number * ALEXNET[name] - theirs))
          for name, total in _sums(errors).items()}


def missing(errors: Errors) -> list[tuple[str, int]]:
  """Those of the 75 settings, in their order, of which there is no error."""
  return [(name, severity) for name, severity in SETTINGS if severity not in errors.get(name, {})]


def standard_error(error: float, images: int) -> float:
  """Of an error that was counted on so many images: sqrt(p (1 - p) / n), a fraction.

  Raises:
    InputError: the error is no fraction, or there are no images.
  """
  if images < 1:
    raise InputError(f"images={images}: a standard error needs 1 or more")
  return math.sqrt(_fraction(error, "a set") * (1 - error) / images)


def _sums(errors: Errors) -> dict[str, float]:
  """Sum over the severities of each corruption that has all five, in the order of CORRUPTIONS."""
  incomplete = {name for name, _ in missing(errors)}
  return {name: math.fsum(_fraction(errors[name][severity], f"{name} at severity {severity}")
                          for severity in SEVERITIES)
          for name in CORRUPTIONS if name not in incomplete}


def _mean(values: Mapping[str, float]) -> float:
  return math.fsum(values.values()) / len(values)


def _fraction(error: float, where: str) -> float:
  if not 0 <= error <= 1:              # NaN is none, too
    raise InputError(f"error={error!r} on {where} is no fraction: give 0 to 1, not percent")
  return error


def _refuse_missing(what: str, errors: Errors) -> None:
  lacking: dict[str, list[str]] = {}
  for name, severity in missing(errors):
    lacking.setdefault(name, []).append(str(severity))
  if lacking:
    listed = "; ".join(name if len(severities) == len(SEVERITIES)
                       else f"{name} at severity {', '.join(severities)}"
                       for name, severities in lacking.items())
    raise InputError(f"{what} needs all {len(CORRUPTIONS)} corruptions at all {len(SEVERITIES)} "
                     f"severities, and these are missing: {listed}")
