"""Which micro-batches are tried, by a compiler that only pretends."""

import pytest

from launch import fitting, slices, step_program
from launch.recipe import make_recipe
from tests.small_run import make_config

GIB = 2**30


def recipe_of(per_chip, remat=False):
  config = make_config({"data.batch_size": 4 * per_chip, "eval.batch_size": 4,
                        "model.remat": remat})
  return make_recipe(config, slices.parse_slice("v5e:2x2"), 10, 1000)


def compiler(image_bytes, constant=GIB, available=16 * GIB):
  """A step needs so many bytes for each image, a fifth with remat, and a constant."""
  def attempt(recipe):
    images = recipe.at_once * image_bytes / (5 if recipe.config.model.remat else 1)
    needed = int(images + constant)
    fits = needed <= available
    return fitting.Attempt(recipe, step_program.Compiled(
        fits, needed, available_bytes=None if fits else available))
  return attempt


def tried(per_chip, gib_of_image, remat=False, **settings):
  attempts = fitting.fit(recipe_of(per_chip, remat), compiler(gib_of_image * GIB), **settings)
  return [(a.recipe.at_once, a.recipe.config.train.accumulation, a.recipe.config.model.remat,
           a.compiled.fits) for a in attempts]


def test_what_fits_is_left_as_it_is():
  assert tried(128, 0.1) == [(128, 1, False, True)]


def test_micro_batches_are_halved_without_remat_down_to_what_batch_norms_want():
  """100 images would need 51 GiB: their half is not compiled, it cannot fit either."""
  assert tried(128, 0.4) == [(128, 1, False, False), (32, 4, False, True)]


def test_then_blocks_are_computed_again():
  """With all images at once, and then with fewer."""
  assert tried(128, 0.5) == [(128, 1, False, False), (128, 1, True, True)]
  assert tried(128, 1.0) == [(128, 1, False, False), (128, 1, True, False), (64, 2, True, True)]


def test_a_config_with_remat_keeps_it():
  assert tried(64, 2.0, remat=True) == [(64, 1, True, False), (32, 2, True, True)]


def test_nothing_fits():
  """Down to one image, and the last one says no."""
  attempts = fitting.fit(recipe_of(4, remat=True), compiler(GIB, constant=20 * GIB))
  assert [a.recipe.at_once for a in attempts] == [4, 2, 1]
  assert not attempts[-1].compiled.fits


def test_no_search_compiles_one():
  assert tried(128, 0.4, search=False) == [(128, 1, False, False)]


def test_every_alternative_makes_the_same_updates():
  recipe = recipe_of(48)
  for other in fitting.alternatives(recipe):
    config = other.config
    assert config.data.batch_size == recipe.config.data.batch_size
    assert other.at_once * config.train.accumulation * other.slice.chips == config.data.batch_size
    assert other.total_steps == recipe.total_steps


@pytest.mark.parametrize(("images", "halves"), [(8, [8, 4, 2, 1]), (12, [12, 6, 3]), (0, [])])
def test_halves(images, halves):
  assert list(fitting.halves(images)) == halves
