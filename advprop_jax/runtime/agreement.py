"""What the processes of a pod tell each other besides arrays: small JSON, by JAX's coordinator.

Every process calls these functions in the same order. With one process they return at once.
"""

import itertools
import json
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # there is no public way to the coordinator's store
from jax.experimental import multihost_utils

from advprop_jax.errors import InputError

PATIENCE_SECONDS = 3600   # of one process for another that lives; the dead are found by heartbeats
_ENDED, _FAILED = "advprop_jax/ended", "advprop_jax/failed"
_numbers = itertools.count()


def store() -> Any:
  """The client of the pod's key-value store; None where there is no pod."""
  return distributed.global_state.client


def process() -> tuple[int, int]:
  """Number of this process and of all; unlike JAX's own functions, it starts no backend."""
  return distributed.global_state.process_id, distributed.global_state.num_processes


def alone() -> bool:
  """Whether this is the only process."""
  return store() is None or process()[1] == 1


def is_first() -> bool:
  """Whether this process is the one that writes files and talks."""
  return process()[0] == 0


def meet(name: str, seconds: float = PATIENCE_SECONDS) -> None:
  """Waits until every process is here; a JaxRuntimeError when one has not come in time."""
  if not alone():
    store().wait_at_barrier(f"advprop_jax/{name}/{next(_numbers)}", int(seconds * 1000))


def from_first(value: Any) -> Any:
  """The value, which JSON knows, that process 0 has given."""
  if alone():
    return value
  key = f"advprop_jax/first/{next(_numbers)}"
  if is_first():
    store().key_value_set(key, json.dumps(value))
    return value
  return json.loads(store().blocking_key_value_get(key, PATIENCE_SECONDS * 1000))


def arrays_from_first(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays that process 0 has given; the others give some of the same shapes and types."""
  return arrays if alone() else jax.tree.map(np.array,
                                             multihost_utils.broadcast_one_to_all(arrays))


def first_of(said: str | None) -> str | None:
  """What the first of the processes that say anything says; the same on all of them."""
  return next(iter(said_by_any(said)), None)


def said_by_any(said: str | None) -> list[str]:
  """What processes say, in their order, without those that say None; the same on all of them."""
  if alone():
    return [] if said is None else [said]
  number = next(_numbers)
  folder = f"advprop_jax/said/{number}"
  if said is not None:
    store().key_value_set(f"{folder}/{process()[0]:06}", said)
  store().wait_at_barrier(f"{folder}/all", PATIENCE_SECONDS * 1000)
  return [text for _, text in sorted(store().key_value_dir_get(folder))]


def require_same(facts: dict[str, Any]) -> None:
  """Raises an InputError, on every process, where one has other facts than process 0.

  Args:
    facts: {name: what JSON knows}.
  """
  mine = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
  first = from_first(mine)
  differing = [f"{name}: {first.get(name, 'nothing')} -> {mine.get(name, 'nothing')}"
               for name in sorted({**first, **mine}) if first.get(name) != mine.get(name)]
  said = first_of(f"process {process()[0]} differs from process 0: {', '.join(differing[:10])}"
                  if differing else None)
  if said:
    raise InputError(f"{said}; start all processes of the pod from the same files, with the same "
                     "flags")


def tell_end(reason: str, failed: bool) -> None:
  """Leaves to the others why this process ends: by a failure, or as it was told to."""
  if not alone():
    store().key_value_set(f"{_FAILED if failed else _ENDED}/{process()[0]:06}", reason)


def told_failures() -> list[str]:
  """Why processes have failed, as far as they could say; nothing if the coordinator is gone."""
  return _told(_FAILED)


def told_ends() -> list[str]:
  """Why processes have ended, by failures or not, as `told_failures`."""
  return _told(_FAILED) + _told(_ENDED)


def _told(folder):
  try:
    return [text for _, text in sorted(store().key_value_dir_get(folder))]
  except jax.errors.JaxRuntimeError:
    return []
