"""Devices and hosts: the only pmap, and what must not depend on how many devices there are."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

AXIS = "replicas"


def pmap(step: Callable, donate_state: bool = False, devices: Sequence[jax.Device] | None = None,
         of_batch: bool = False) -> Callable:
  """Runs a pure per-device function of (state, batch) on every device.

  State and results have no device axis: the state is replicated, and the results must be the same
  on every device (averaged or summed over AXIS). The batch has a leading axis of local devices.

  Args:
    step: (state, batch) -> any pytree, with collectives over AXIS.
    donate_state: lets the result take the state's memory; the state given in is then gone.
    devices: None for all.
    of_batch: the results are parts of a batch, and have its axis of devices.
  """
  return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=0 if of_batch else None,
                  devices=devices, donate_argnums=(0,) if donate_state else ())


def replicated(devices: Sequence[jax.Device] | None = None) -> jax.sharding.NamedSharding:
  """The sharding that `pmap` gives its results: a copy on each device of this process.

  A state that is put there at the start (`jax.device_put(state, replicated())`) or restored there
  is donated without a copy, and the step compiles once; any other sharding makes it compile twice,
  for the first step and for all others.
  """
  return _local(devices or jax.local_devices())


def replicated_shapes(shapes: Any) -> Any:
  """The shapes of arrays, where `jax.device_put(arrays, replicated())` has put them."""
  place = replicated()
  return jax.tree.map(
      lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place), shapes)


def placed(state: Any, sharding: jax.sharding.NamedSharding) -> Any:
  """The same arrays of another sharding, whose parts on this process's devices are theirs; no copy.
  """
  return jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(
      x.shape, sharding, [shard.data for shard in x.addressable_shards]), state)


def hurried(create: Callable) -> Callable:
  """A function that runs once, jitted in a hurry.

  On the CPU, where a fresh state takes a second and its compilation took half a minute, XLA is told
  not to optimise, and to make fused operations in the older of its two ways, which needs less of
  the compiler and gives the same bits (measured: tests/benchmarks/README.md).
  """
  hurry = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
  return jax.jit(create, compiler_options=hurry if jax.default_backend() == "cpu" else None)


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray | jax.Array]:
  """Splits (n, ...) arrays of this process into (local devices, n / local devices, ...).

  On the CPU they come back on the devices. Where an input is still on its way, a program does not
  run in the call that starts it, in the heap that keeps its temporaries (runtime/memory.py), but on
  another thread: 1.15 times as long. Elsewhere `pmap` sends them, while the step before it runs.
  """
  devices = jax.local_device_count()
  batch = {name: array.reshape(devices, -1, *array.shape[1:]) for name, array in batch.items()}
  if jax.default_backend() != "cpu":
    return batch
  return jax.block_until_ready(jax.device_put(batch, _local(jax.local_devices(), AXIS)))


def local(batch: jax.Array) -> np.ndarray:
  """This process's part of what `pmap` gives `of_batch`, on the host: (n, ...)."""
  shards = sorted(batch.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  parts = np.concatenate([np.asarray(shard.data) for shard in shards])
  return parts.reshape(-1, *parts.shape[2:])


def local_cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_each_step() -> bool:
  """Whether the host must wait for each step's result before it starts the next one.

  Several virtual CPU devices on few cores, of one process or of several, deadlock when many steps
  with collectives are queued.
  """
  return jax.device_count() > 1 and jax.default_backend() == "cpu"


def _local(devices, *axes):
  """The sharding over these devices of arrays with such leading axes."""
  mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
