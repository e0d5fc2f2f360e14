"""The same numbers on 1, 2 and 4 devices. Virtual ones, so in a process of its own."""

import numpy as np
import pytest

from tests import virtual_devices

PROGRAM = """
import functools, json
import jax, numpy as np, optax
from jax.flatten_util import ravel_pytree
from advprop_jax.method.attack import Attack
from advprop_jax.method.schemes import SCHEMES
from advprop_jax.method.state import create_train_state
from advprop_jax.method.measure import Attacker, measure_step, shown_step
from advprop_jax.method.step import Method, train_step
from advprop_jax.runtime import parallel
from tests import one_block

def make_batch(n):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (n, 28, 28, 3), np.uint8)
  image[n // 2:] //= 2   # so that the halves have other statistics
  return {"image": image, "second_image": image[:, ::-1].copy(),
          "label": (np.arange(n) % 10).astype(np.int32)}

def run(devices, group_size, rates, name="advprop", n=8):
  scheme, batch = SCHEMES[name], make_batch(n)
  model = one_block.create(domains=scheme.domains, axis_name=parallel.AXIS, group_size=group_size,
                           dropout_rate=rates, drop_path_rate=rates)
  method = Method(model, scheme, Attack(num_steps=2, statistics="batch", clean_start=0.5),
                  optax.sgd(0.1))
  state = create_train_state(model, method.optimizer, 0, 28, False)
  sharded = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}
  pmap = functools.partial(parallel.pmap, devices=jax.devices()[:devices])
  new_state, metrics = pmap(functools.partial(train_step, method))(state, sharded)
  shape = sharded["label"].shape
  sharded |= {"mask": np.ones(shape, bool), "index": np.arange(n, dtype=np.int32).reshape(shape)}
  attacker = Attacker(Attack(num_steps=1), model)
  shown = pmap(functools.partial(shown_step, attacker), of_batch=True)(
      {"variables": new_state.variables, "strength": np.array([4, 1], np.float32)}, sharded)
  said = pmap(functools.partial(measure_step, model, axis_name=parallel.AXIS))(
      {"variables": new_state.variables, "classes": np.ones(10, bool)}, {**sharded, "image": shown})
  flat = lambda tree: np.asarray(ravel_pytree(jax.tree.map(np.asarray, tree))[0]).tolist()
  gradient = jax.tree.map(lambda a, b: (a - b) / 0.1, state.params, new_state.params)
  return {"gradient": flat(gradient), "stats": flat(new_state.batch_stats),
          "metrics": {k: float(v) for k, v in metrics.items()},
          "said": np.concatenate([np.asarray(said[k], float) for k in sorted(said)]).tolist()}

print(json.dumps({
    "synced": [run(n, n, 0.0) for n in (1, 2, 4)],
    "dropout": [run(n, n, 0.3) for n in (1, 4)],
    "joint": [run(n, n, 0.3, "joint") for n in (1, 2)],
    "fine_grained": [run(n, n, 0.3, "fine_grained") for n in (1, 2)],
    "fast_advprop": [run(n, n, 0.3, "fast_advprop", 20) for n in (1, 2)],
    "groups": run(4, 2, 0.0), "local": run(2, 1, 0.0)}))
"""


@pytest.fixture(scope="module")
def results():
  return virtual_devices.run(PROGRAM, 4)


def close(a, b, part):
  values = [np.array(list(x[part].values()) if isinstance(x[part], dict) else x[part])
            for x in (a, b)]
  return np.allclose(*values, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("part", ["gradient", "stats", "metrics", "said"])
@pytest.mark.parametrize("run", ["synced", "dropout", "joint", "fine_grained", "fast_advprop"])
def test_the_number_of_devices_changes_nothing(results, run, part):
  """With statistics over all replicas: attack, dropout, gradients, statistics and evaluation.

  Fails where gradients are summed or left per device, where statistics are those of one replica,
  or where noise, targets or dropout masks depend on the device.
  """
  first, *others = results[run]
  assert all(close(first, other, part) for other in others)


def test_dropout_is_there_at_all(results):
  assert not close(results["synced"][0], results["dropout"][0], "gradient")


def test_statistics_of_groups(results):
  """Four replicas in groups of two have the statistics of two replicas by themselves."""
  assert close(results["groups"], results["local"], "stats")
  assert close(results["groups"], results["local"], "gradient")
  assert not close(results["groups"], results["synced"][0], "stats")
