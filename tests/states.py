"""States to be kept and read back, for the tests of checkpoints."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from advprop_jax.runtime.checkpoint import Checkpoints
from tests.conftest import ROOT

ITERATOR = {"position": 7, "epoch": [1, 2]}
CONFIG = {"scheme": "advprop", "attack": {"epsilon": 4.0}}


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: Any
  key: jax.Array
  name: str = flax.struct.field(pytree_node=False, default="tiny")


def make_state(seed: int = 0, width: int = 40) -> State:
  key = jax.random.key(seed)
  params = {"conv": {"kernel": jax.random.normal(key, (3, 3, 8, width)),
                     "half": jax.random.normal(key, (width,)).astype(jnp.bfloat16)},
            "bias": jnp.zeros((width,))}
  return State(jnp.int32(seed), params, {"mean": jnp.arange(8.0) / 3},
               optax.adamw(1e-3).init(params), jax.random.PRNGKey(seed))


def same(left: Any, right: Any) -> bool:
  """Same tree, types and bits."""
  if jax.tree.structure(left) != jax.tree.structure(right):
    return False
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
             for a, b in pairs)


def save_steps(directory: Any, steps: list[int]) -> None:
  with Checkpoints(directory, keep=len(steps)) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, make_state(step), ITERATOR | {"step": step}, CONFIG)


def all_files(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def run_python(code: str, **options) -> subprocess.Popen:
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
