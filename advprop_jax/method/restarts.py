"""Several attempts of an attack on each image, of which the best counts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def strongest(attack_once: Callable[[jax.Array], jax.Array],
              judge: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
              keys: jax.Array, restarts: int) -> jax.Array:
  """The strongest of some attacks, for each image by itself.

  Args:
    attack_once: keys (n, ...) -> adversarial images (n, h, w, 3), each by its own key.
    judge: images (n, h, w, 3) -> the losses (n,), and whether each is misclassified (n,).
    keys: (n, ...), a random key for each image. The first attack is given these.
    restarts: number of attacks, static, >= 1. With 1 there is no judge: attack_once(keys).

  Returns:
    (n, h, w, 3): for each image the first result that is misclassified, else the one of the highest
    loss.
  """
  if restarts == 1:
    return attack_once(keys)

  def attempt(r, kept):
    images, losses, wrong = kept
    others = jax.vmap(lambda key: jax.random.fold_in(key, 1000 + r))(keys)
    new = attack_once(jnp.where(r == 0, keys, others))
    new_losses, new_wrong = judge(new)
    better = (r == 0) | (~wrong & (new_wrong | (new_losses > losses)))
    images = jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, images)
    return images, jnp.where(better, new_losses, losses), jnp.where(better, new_wrong, wrong)

  shape = jax.eval_shape(attack_once, keys)
  nothing = (jnp.zeros(shape.shape, shape.dtype), jnp.zeros(len(keys)), jnp.zeros(len(keys), bool))
  return jax.lax.fori_loop(0, restarts, attempt, nothing)[0]
