"""What worker processes have to leave as it is."""

import numpy as np

from advprop_jax.data.loader import evaluation_batches
from advprop_jax.data.transforms import evaluation_transform


def batches_of_workers(source, size, batch_size):
  """The batches of a source whose images have that size, which are the same with a worker."""
  batches = {num_workers: list(evaluation_batches(
      source, batch_size=batch_size, transform=evaluation_transform(size),
      num_workers=num_workers, num_threads=2)) for num_workers in (0, 1)}
  for one, other in zip(batches[0], batches[1], strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  return batches[0]
