"""The picture shows what it says."""

import numpy as np

from advprop_jax import report


def draw(change, epsilon):
  clean = np.full((3, 8, 8, 3), 100.0)
  line = [("label", report.INK)] * 3
  image = report.panel(clean, clean + change, epsilon, "title", report.Captions([line], [line]))
  return np.asarray(image)


def cells(image, value):
  """Number of pixels of exactly this grey."""
  return int(np.sum(np.all(image == value, axis=-1)))


def test_no_change_is_grey():
  image = draw(0.0, 4.0)
  assert 0 <= cells(image, 128) - 3 * report.CELL ** 2 < 500  # the edges of letters are grey too
  assert cells(image, 100) >= 6 * report.CELL ** 2        # clean and adversarial alike


def test_the_factor_makes_the_ball_as_large_as_the_range():
  """A perturbation of +epsilon is nearly white, -epsilon nearly black, at any epsilon."""
  for epsilon in (2.0, 4.0, 16.0):
    factor = int(127 / epsilon)
    for sign in (1, -1):
      value = 128 + factor * epsilon * sign
      assert 1 <= abs(value - (255 if sign > 0 else 0)) <= 16
      assert 0 <= cells(draw(sign * epsilon, epsilon), value) - 3 * report.CELL ** 2 < 500


def test_long_names_are_cut():
  line = [("a very long name of a class that does not fit", report.INK)] * 3
  pixels = np.zeros((3, 8, 8, 3))
  report.panel(pixels, pixels, 0.0, "title", report.Captions([line], [line]))
