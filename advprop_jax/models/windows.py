"""Windows of images, as convolutions move and add them: padding, shifts, phases of a stride."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
  """TensorFlow's 'SAME': (before, after) along an axis of this length."""
  total = max((-(-length // stride) - 1) * stride + size - length, 0)
  return total // 2, total - total // 2


def symmetric_padding(size: int) -> list[tuple[int, int]]:
  """size // 2 pixels on each side, (before, after) along both axes; for an odd size."""
  return [(size // 2, size // 2)] * 2


def result_size(shape: tuple[int, ...], stride: int) -> tuple[int, int]:
  """Height and width of what 'SAME', or k // 2 for an odd k, makes of images (n, h, w, ...)."""
  return -(-shape[1] // stride), -(-shape[2] // stride)


def window(image: jax.Array, i: int, j: int, height: int, width: int, stride: int) -> jax.Array:
  """Every stride-th pixel from row i, column j on: (n, height, width, ...)."""
  rest = image.ndim - 3
  ends = (image.shape[0], i + (height - 1) * stride + 1, j + (width - 1) * stride + 1,
          *image.shape[3:])
  return jax.lax.slice(image, (0, i, j, *[0] * rest), ends, (1, stride, stride, *[1] * rest))


def phases_of(kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]
              ) -> tuple[jax.Array, list[tuple[int, int]]]:
  """The kernel, seen from the gradient of its convolution, phase by phase of the image.

  Row `stride * r + p` of the image is of phase p. Tap i brings it to row r + m of the result,
  where i = p + before - stride * m: a shift by m for each run of `stride` taps.

  Args:
    kernel: (k, k, inputs, outputs).
    stride: along both axes.
    padding: of the image, (before, after) along both axes.

  Returns:
    The taps, (shifts, shifts, stride, stride, inputs, outputs), zero where the kernel has none, and
    by how many pixels the shifts reach over the result, (before, after) along both axes.
  """
  size, ends, margins = len(kernel), [], []
  for before, _ in padding:
    up, down = (size - 1 - before) // stride, (stride - 1 + before) // stride
    margins.append((up, down))
    ends.append((stride * down - before, stride * (up + 1) + before - size))
  runs = jnp.pad(kernel, (*ends, (0, 0), (0, 0)))
  runs = runs.reshape(-1, stride, sum(margins[1]) + 1, stride, *kernel.shape[2:])
  return jnp.flip(runs, (0, 2)).swapaxes(1, 2), margins


def from_phases(phases: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """(n, rows, phases, columns, phases, c) -> (n, h, w, c), height and width being shape[1:3]."""
  rows, stride, columns = phases.shape[1:4]
  image = phases.reshape(-1, rows * stride, columns * stride, phases.shape[-1])
  return image[:, :shape[1], :shape[2]]


def spread(terms: Sequence[Sequence[jax.Array]], stride: int,
           padding: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> jax.Array:
  """The image to which each tap of a kernel brings its term: the way back of `window`.

  Tap i brings row m of a result to row `stride * m + i - before` of the image, so to all rows of
  one phase, moved.

  Args:
    terms: one for each tap, [row][column], each (n, height, width, c), those of a result.
    stride: along both axes.
    padding: of the image, (before, after) along both axes.
    shape: of the image, (n, h, w, ...).

  Returns:
    (n, h, w, c).
  """
  (above, _), (left, _) = padding
  phases = [[jnp.zeros_like(terms[0][0]) for _ in range(stride)] for _ in range(stride)]
  for i, row in enumerate(terms):
    down, p = divmod(i - above, stride)
    for j, term in enumerate(row):
      right, q = divmod(j - left, stride)
      phases[p][q] += jax.lax.pad(term, jnp.zeros((), term.dtype), [
          (0, 0, 0), (down, -down, 0), (right, -right, 0), (0, 0, 0)])
  return from_phases(jnp.stack([jnp.stack(row, 3) for row in phases], 2), shape)


def apart(function: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """function(x), computed once and kept: in a branch of its own, always taken.

  Without this fence XLA, which on the CPU keeps no optimization_barrier unless it is told to
  (runtime/xla_flags.py), computes a sum over taps again in each of the operations that read the
  result, and what made x again for each tap: 1.1 to 1.4 times as long. What tells the branch is not
  known to the compiler: whether a number of the kernel is one.
  """
  result = jax.eval_shape(function, x)
  return jax.lax.cond(kernel[0, 0, 0, 0] == kernel[0, 0, 0, 0], function,
                      lambda x: jnp.full_like(x, jnp.nan, result.dtype, result.shape), x)
