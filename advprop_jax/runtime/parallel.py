"""Devices and hosts: the only pmap, and what must not depend on how many devices there are."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "replicas"


def pmap(step: Callable, donate_state: bool = False,
         devices: Sequence[jax.Device] | None = None) -> Callable:
  """Runs a pure per-device function of (state, batch) on every device.

  State and results have no device axis: the state is replicated, and the results must be the same
  on every device (averaged or summed over AXIS). The batch has a leading axis of local devices.

  Args:
    step: (state, batch) -> any pytree, with collectives over AXIS.
    donate_state: lets the result take the state's memory; the state given in is then gone.
    devices: None for all.
  """
  return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices,
                  donate_argnums=(0,) if donate_state else ())


def run_once(create: Callable):
  """Runs a function of no arguments, compiled in a hurry.

  On the CPU, where a fresh state takes a second and its compilation took half a minute, XLA is told
  not to optimise.
  """
  hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(create, compiler_options=hurry)()


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Splits (n, ...) arrays of this process into (local devices, n / local devices, ...)."""
  devices = jax.local_device_count()
  return {name: array.reshape(devices, -1, *array.shape[1:]) for name, array in batch.items()}


def image_keys(key: jax.Array, images: int, axis_name: str | None = AXIS) -> jax.Array:
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


def wait_each_step() -> bool:
  """Whether the host must wait for each step's result before it starts the next one.

  Several virtual CPU devices on few cores deadlock when many steps with collectives are queued.
  """
  return jax.local_device_count() > 1 and jax.default_backend() == "cpu"
