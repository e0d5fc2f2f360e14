"""Input conventions: what numbers the first convolution of a network was trained to read.

Images of this project are in [-1, 1] everywhere, so that an attack's epsilon means the same for
every network. Published weights were trained on images normalised in several ways; a network that
has them normalises its images by itself, as its first step on the device.

Folding the normalisation into the first convolution is no way out: zeros that pad the image are
zeros *after* the normalisation, and after the folding they would be another colour.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advprop_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Convention:
  """What a network reads: (pixel / 255 - mean) / std, per channel, red first.

  Attributes:
    mean: of each channel, 1 is white.
    std: deviation of each channel.
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  @property
  def scale(self) -> tuple[float, ...]:
    """What an image in [-1, 1] is multiplied by."""
    return tuple(0.5 / std for std in self.std)

  @property
  def shift(self) -> tuple[float, ...]:
    """What is added then."""
    return tuple((0.5 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))


# *Sources:* timm/data/constants.py (IMAGENET_INCEPTION_*, IMAGENET_DEFAULT_*); tensorflow/tpu,
# models/official/efficientnet/lite/efficientnet_lite_builder.py (MEAN_RGB, STDDEV_RGB).
CONVENTIONS = {
    "inception": Convention((0.5,) * 3, (0.5,) * 3),                    # [-1, 1]: AdvProp's
    "imagenet": Convention((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "lite": Convention((127 / 255,) * 3, (128 / 255,) * 3),             # (pixel - 127) / 128
}


def normalised(images: jax.Array, name: str) -> jax.Array:
  """Images as a network of a convention reads them.

  Args:
    images: (..., 3), in [-1, 1].
    name: a key of CONVENTIONS.
  """
  if name == "inception":
    return images
  convention = CONVENTIONS[name]
  return images * jnp.asarray(convention.scale) + jnp.asarray(convention.shift)


def convention_named(mean, std) -> str:
  """The name of the convention of a mean and a deviation, as a model's JSON states them.

  Raises:
    InputError: none of CONVENTIONS is it.
  """
  for name, known in CONVENTIONS.items():
    if all(len(given) == 3 and all(abs(a - b) < 1e-3 for a, b in zip(given, ours, strict=True))
           for given, ours in ((mean, known.mean), (std, known.std))):
      return name
  there = "; ".join(f"{name}: mean {known.mean}, std {known.std}"
                    for name, known in CONVENTIONS.items())
  raise InputError(f"mean {mean} and std {std} of images are no input convention that is known "
                   f"({there})")
