"""Nanoseconds of a core for each value: a batch norm's affine map, swish behind it, their gradient.

  python -m tests.benchmarks.elementwise
  XLA_FLAGS=--xla_backend_extra_options=-stats=0 python -m tests.benchmarks.elementwise

With the flags that the program sets (runtime/xla_flags.py), but for those that XLA_FLAGS names: the
second command is without LLVM's options.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax.models.activation import swish
from advprop_jax.models.batch_norm import affine_map
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.parallel import local_cores
from advprop_jax.runtime.xla_flags import set_flags

SHAPES = [(128, 28, 28, 16), (128, 14, 14, 16), (128, 14, 14, 64), (128, 7, 7, 40),
          (128, 4, 4, 384), (16, 64, 64, 32), (16, 16, 16, 240), (16, 8, 8, 672)]
TIMES, REPEATS = 20, 7                 # in one program, and of it


def norm(x, statistics):
  return affine_map(x[None], *statistics)[0]


def norm_and_swish(x, statistics):
  return swish(norm(x, statistics))


def gradient(x, statistics):
  return jax.vjp(lambda x: norm_and_swish(x, statistics), x)[1](x)[0]


def nanoseconds(function, shape) -> float:
  """Of one value, in the median; the result is the next input, so that all are computed."""
  chance = np.random.default_rng(0)
  x = jnp.asarray(chance.standard_normal(shape), jnp.float32)
  statistics_ = jnp.asarray(chance.uniform(0.5, 1, (3, 1, shape[-1])), jnp.float32)
  run = jax.jit(lambda x, statistics: jax.lax.fori_loop(
      0, TIMES, lambda _, x: function(x, statistics), x))
  run(x, statistics_).block_until_ready()
  seconds = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    run(x, statistics_).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 1e9 * statistics.median(seconds) * local_cores() / (TIMES * x.size)


def main() -> None:
  keep_freed_memory()
  set_flags()
  for shape in SHAPES:
    print(json.dumps({"shape": shape, **{function.__name__: round(nanoseconds(function, shape), 2)
                                         for function in (norm, norm_and_swish, gradient)}}),
          flush=True)


if __name__ == "__main__":
  main()
