"""Which micro-batch fits: the config's own, or what is tried after it, one compilation each."""

import dataclasses
from collections.abc import Callable, Iterator

import ml_collections

from advprop_jax.experiment import resolve
from launch.recipe import Recipe
from launch.step_program import Compiled

# Batch norms want no fewer images of a chip (configs/imagenet_efficientnet.py, set_chips): below
# it a gradient computes blocks again, and keeps its images.
LEAST_WITHOUT_REMAT = 32


@dataclasses.dataclass(frozen=True)
class Attempt:
  """A recipe that was compiled.

  Attributes:
    recipe: with the micro-batch that was tried.
    compiled: what the compiler said.
    was_kept: whether it said so earlier, and that was kept.
  """

  recipe: Recipe
  compiled: Compiled
  was_kept: bool = False

  def __str__(self) -> str:
    return describe(self.recipe)


def describe(recipe: Recipe) -> str:
  """How a recipe deals its batch out."""
  train, remat = recipe.config.train, recipe.config.model.remat
  return (f"{recipe.at_once} images per chip at a time, accumulation {train.accumulation}, "
          f"{'with' if remat else 'without'} remat")


def fit(recipe: Recipe, attempt: Callable[[Recipe], Attempt], search: bool = True) -> list[Attempt]:
  """Compiles a recipe and, while it needs more memory than there is, smaller ones.

  Args:
    recipe: as its config has it.
    attempt: compiles one.
    search: whether others are tried at all.

  Returns:
    What was compiled, in that order; the last one fits, or nothing does.
  """
  attempts = [attempt(recipe)]
  for smaller in alternatives(recipe):
    last = attempts[-1]
    if last.compiled.fits or not search:
      break
    if not hopeless(smaller, last):
      attempts.append(attempt(smaller))
  return attempts


def alternatives(recipe: Recipe) -> Iterator[Recipe]:
  """What to try where a recipe does not fit, the fastest first.

  Smaller micro-batches without remat, down to what batch norms want; then with remat, from the
  recipe's own down to a single image.
  """
  own = recipe.at_once
  if not recipe.config.model.remat:
    for images in halves(own // 2):
      if images >= LEAST_WITHOUT_REMAT:
        yield changed(recipe, images, remat=False)
    yield changed(recipe, own, remat=True)
  for images in halves(own // 2):
    yield changed(recipe, images, remat=True)


def halves(images: int) -> Iterator[int]:
  """images, its half, ... down to 1, as long as they are whole."""
  while images:
    yield images
    images = 0 if images % 2 else images // 2


def changed(recipe: Recipe, at_once: int, remat: bool) -> Recipe:
  """The same updates, dealt out to micro-batches of so many images per chip."""
  config = ml_collections.ConfigDict(recipe.config)
  config.model.remat = remat
  config.train.accumulation = config.data.batch_size // (recipe.slice.chips * at_once)
  return dataclasses.replace(recipe, config=resolve(config, devices=recipe.slice.chips))


def hopeless(smaller: Recipe, refused: Attempt) -> bool:
  """Whether a smaller micro-batch cannot fit, by what a larger one of the same kind would need.

  What is needed is a constant and so much for each image: half of the images need half of it at
  least.
  """
  if smaller.config.model.remat != refused.recipe.config.model.remat:
    return False
  share = smaller.at_once / refused.recipe.at_once
  return refused.compiled.needed_bytes * share > refused.compiled.available_bytes
