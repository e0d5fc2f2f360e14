"""Restarts of an attack. A test says in its docstring which fault makes it fail."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.method.restarts import strongest

N = 400
KEYS = jax.random.split(jax.random.PRNGKey(0), N)


def draw(key):
  return jax.random.uniform(key, (2, 2, 3))


def attack_once(keys):
  """An attack that does nothing but draw."""
  return jax.vmap(draw)(keys)


def judge(images):
  """A loss, and whether an image is misclassified; these have nothing to do with each other."""
  return images[:, 0, 0, 0], images[:, 1, 1, 1] > 0.8


def attempts(restarts):
  """The results of all attempts, (restarts, n, ...), in their order."""
  folded = [jax.vmap(lambda key, r=r: jax.random.fold_in(key, 1000 + r))(KEYS)
            for r in range(1, restarts)]
  return np.stack([attack_once(keys) for keys in (KEYS, *folded)])


@pytest.mark.parametrize("restarts", [2, 3, 7])
def test_first_misclassified_one_or_the_highest_loss(restarts):
  """As loops and ifs have it.

  Fails where the last misclassified one is kept, or the one of highest loss among these, or a
  higher loss wins over a misclassified one; with other keys; with one attempt too few or too many;
  where an image's attempt depends on other images.
  """
  images = attempts(restarts)
  losses, wrong = (np.stack(x) for x in zip(*map(judge, images), strict=True))
  kept = []
  for i in range(N):
    chosen = int(np.argmax(losses[:, i]))
    for r in reversed(range(restarts)):
      if wrong[r, i]:
        chosen = r
    kept.append(chosen)
  assert len(set(kept)) == restarts
  assert 0.1 < np.mean(wrong.any(0)) < 0.9
  result = jax.jit(lambda keys: strongest(attack_once, judge, keys, restarts))(KEYS)
  np.testing.assert_array_equal(result, images[kept, np.arange(N)])


def test_one_restart_is_the_attack_itself():
  """Fails where the first attempt has other keys than an attack without restarts, or is judged."""
  def nobody(images):
    raise AssertionError("was judged")

  np.testing.assert_array_equal(strongest(attack_once, nobody, KEYS, 1), attack_once(KEYS))


@pytest.mark.parametrize("loss", [-jnp.inf, jnp.nan, -5.0])
def test_the_first_attempt_counts_whatever_its_loss_is(loss):
  """Fails where it has to be better than nothing."""
  result = strongest(attack_once, lambda x: (jnp.full(len(x), loss), jnp.zeros(len(x), bool)),
                     KEYS, 3)
  np.testing.assert_array_equal(result, attack_once(KEYS))


def test_more_restarts_are_never_weaker():
  def success(restarts):
    losses, wrong = judge(strongest(attack_once, judge, KEYS, restarts))
    return np.where(wrong, np.inf, losses)

  results = [success(restarts) for restarts in (1, 2, 4, 8)]
  for weaker, stronger in itertools.pairwise(results):
    assert np.all(stronger >= weaker)
    assert np.mean(stronger > weaker) > 0.1


def test_the_program_does_not_grow():
  """Fails with an unrolled loop, or with an attempt outside of it."""
  traced = []

  def counted(keys):
    traced.append(keys)
    return attack_once(keys)

  sizes = []
  for restarts in (2, 20):
    traced.clear()
    lowered = jax.jit(functools.partial(strongest, counted, judge, restarts=restarts)).lower(KEYS)
    sizes.append(len(lowered.as_text()))
    assert len(traced) <= 2  # one of these is for the shape alone
  assert abs(sizes[1] - sizes[0]) < 50


def test_typed_keys_do_as_well():
  keys = jax.random.wrap_key_data(KEYS)
  np.testing.assert_array_equal(strongest(attack_once, judge, keys, 4),
                                strongest(attack_once, judge, KEYS, 4))
