"""Dropout and stochastic depth, drawn per image.

The masks depend on the key, the layer, the domain and the image's place in the global batch alone:
they are the same on any number of devices, and in one pass of two domains or two passes of one.
There is no switch: whoever gives the key (`rngs={"dropout": key}`) has dropout, and whoever gives
none has none.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
  """Sets values to zero with probability `rate` and scales the rest up.

  Attributes:
    rate: probability of zero, in [0, 1).
    domains: all domains of the model.
    axis_name: the pmapped axis; None outside of pmap.
    whole_image: draws once per image in place of once per value: stochastic depth, where the input
      is a residual branch (Huang et al., ECCV 2016).
  """

  rate: float
  domains: tuple[str, ...] = ("clean",)
  axis_name: str | None = None
  whole_image: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, domains: Sequence[str]) -> jax.Array:
    """x: (images, ...), the images of `domains` in that order, in equal parts. Same shape out."""
    if self.rate == 0 or not self.has_rng("dropout"):
      return x
    shape = (1,) * (x.ndim - 1) if self.whole_image else x.shape[1:]
    key = self.make_rng("dropout")
    draw = _bernoulli(1 - self.rate, shape)
    kept = jnp.concatenate([
        draw(image_keys(jax.random.fold_in(key, self.domains.index(domain)),
                        len(x) // len(domains), self.axis_name))
        for domain in domains])
    return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def image_keys(key: jax.Array, images: int, axis_name: str | None = None) -> jax.Array:
  """A random key for each image of this device, by the image's place in the global batch.

  What is drawn with them is the same for any number of devices.

  Args:
    key: one key, the same on all devices.
    images: the number of images on this device.
    axis_name: the pmapped axis; None outside of pmap.

  Returns:
    Keys, shape (images, ...).
  """
  place = jnp.arange(images)
  if axis_name is not None:
    place += images * jax.lax.axis_index(axis_name)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(place)


def _bernoulli(probability: float, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
  return jax.vmap(lambda key: jax.random.bernoulli(key, probability, shape))
