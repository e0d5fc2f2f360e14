"""What goes to the devices."""

import jax
import numpy as np
import optax

from advprop_jax.method.state import create_train_state
from advprop_jax.runtime import parallel
from tests import one_block


def test_a_batch_lies_on_the_devices_before_the_step_is_called():
  """Or it would run on another thread. Its split must be the one that `pmap` expects."""
  images = np.arange(24, dtype=np.uint8).reshape(6, 4)
  batch = parallel.shard({"image": images})
  devices = jax.local_device_count()
  assert isinstance(batch["image"], jax.Array)
  assert batch["image"].is_ready()
  assert batch["image"].dtype == np.uint8
  np.testing.assert_array_equal(batch["image"], images.reshape(devices, -1, 4))
  assert batch["image"].sharding.shard_shape(batch["image"].shape) == (1, 6 // devices, 4)
  step = parallel.pmap(lambda state, batch: jax.lax.psum(
      batch["image"].astype(np.int32).sum() + state, parallel.AXIS))
  assert step(0, batch) == images.sum()


def test_a_state_made_in_a_hurry_is_the_state():
  """Fault: a compiler that is told to hurry, and gives other weights, momenta or averages."""
  def create():
    return create_train_state(one_block.create(), optax.adam(1e-3), 0, 28, ema=True)

  hurried, plain = parallel.hurried(create)(), jax.jit(create)()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
               hurried, plain)
