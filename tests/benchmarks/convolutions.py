"""Milliseconds of what ResNet-50 has beside products, at 128 px: the forms for the CPU, and XLA's.

  python -m tests.benchmarks.convolutions

Gradients of 3 x 3 convolutions, and the max-pool and its gradient, 8 images, in turn; outside of
loops, where XLA moves the axes of its own gradients as it likes them. One JSON line for each shape
and what is taken of it.
"""

import functools
import json
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax.models.dense import dense
from advprop_jax.models.pooling import max_pool
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags

# Side of the image, inputs, outputs, stride; the last is the first stage's at 224 px.
CONVOLUTIONS = [(32, 64, 64, 1), (32, 128, 128, 2), (16, 128, 128, 1), (16, 256, 256, 2),
                (8, 256, 256, 1), (8, 512, 512, 2), (4, 512, 512, 1), (56, 64, 64, 1)]
POOL = (64, 64)                        # side and channels
IMAGES, REPEATS = 8, 41


def by_xla(x, kernel, stride):
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)],
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool_by_xla(x):
  return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


def milliseconds(forms, inputs, gradient, of) -> dict[str, float]:
  """Of each form's gradient with respect to the input of that number, or of itself: medians, in
  turn."""
  runs = {name: jax.jit(functools.partial(gradient_of, form, of)) for name, form in forms.items()}
  times = {name: [] for name in runs}
  for _ in range(REPEATS + 1):         # the first compiles
    for name, run in runs.items():
      start = time.perf_counter()
      run(inputs, gradient).block_until_ready()
      times[name].append(1e3 * (time.perf_counter() - start))
  return {name: round(statistics.median(found[1:]), 2) for name, found in times.items()}


def gradient_of(form, of, inputs, gradient):
  y, backward = jax.vjp(form, *inputs)
  return y if of is None else backward(gradient)[of]


def report(what, forms, inputs, gradient, of):
  found = milliseconds(forms, inputs, gradient, of)
  print(json.dumps({"shape": inputs[0].shape, **what,
                    "of": {0: "image", 1: "kernel", None: "result"}[of], **found,
                    "ratio": round(found["here"] / found["xla"], 2)}), flush=True)


def main() -> None:
  keep_freed_memory()
  set_flags()
  chance = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(chance.standard_normal(shape), jnp.float32)

  for side, inputs, outputs, stride in CONVOLUTIONS:
    forms = {"here": functools.partial(dense, stride=stride, symmetric=True),
             "xla": functools.partial(by_xla, stride=stride)}
    arrays = draw(IMAGES, side, side, inputs), draw(3, 3, inputs, outputs)
    for of in (0, 1):
      report({"outputs": outputs, "stride": stride}, forms, arrays,
             draw(IMAGES, side // stride, side // stride, outputs), of)
  side, channels = POOL
  for of in (0, None):
    report({"pool": 3, "stride": 2}, {"here": lambda x: max_pool(x, 3, 2), "xla": pool_by_xla},
           (draw(IMAGES, side, side, channels),),
           draw(IMAGES, side // 2, side // 2, channels), of)


if __name__ == "__main__":
  main()
