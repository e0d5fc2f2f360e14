"""Checkpoints: exact, asynchronous beside donation, whole or not there, never garbage."""

import ctypes
import errno
import json
import os
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from advprop_jax.errors import FaultError, InputError
from advprop_jax.runtime import integrity, quiet
from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.runtime.parallel import pmap, replicated
from advprop_jax.runtime.workdir import make_workdir
from tests.states import CONFIG, ITERATOR, State, make_state, run_python, same, save_steps

# ------------------------------------------------------------------------------- save and restore


def test_restores_every_bit_and_type(tmp_path):
  """Values, types (bfloat16, int32, uint32), containers, static fields and JSON come back."""
  state = make_state(3)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.restore_latest(state) is None
    checkpoints.save(12, state, ITERATOR, CONFIG, {"top1": 0.5})
    restored = checkpoints.restore_latest(jax.eval_shape(lambda: make_state(3)))
  assert same(restored.state, state)
  assert isinstance(restored.state, State)
  assert (restored.step, restored.iterator, restored.config) == (12, ITERATOR, CONFIG)
  assert restored.metrics == {"top1": 0.5}
  assert restored.state.name == "tiny"
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [12]
    assert same(checkpoints.restore_latest(state).state, state)


def test_plain_orbax_reads_it_told_nothing(tmp_path):
  """Fails where what was saved can only be read where there are such devices as it was on."""
  save_steps(tmp_path, [1])
  state = ocp.PyTreeCheckpointer().restore(tmp_path / "1" / "state")
  leaves, expected = jax.tree.leaves(state), jax.tree.leaves(make_state(1))
  assert {type(leaf) for leaf in leaves} == {np.ndarray}
  assert sorted(map(_bits, leaves)) == sorted(map(_bits, expected))


def _bits(array):
  return str(array.dtype), array.shape, np.asarray(array).tobytes()


def test_a_second_save_of_a_step_changes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.save(1, make_state(1), ITERATOR, CONFIG)
    assert not checkpoints.save(1, make_state(2), ITERATOR, CONFIG)
    assert same(checkpoints.restore_latest(make_state()).state, make_state(1))


def test_restores_a_part_without_the_optimizer(tmp_path):
  save_steps(tmp_path, [1])
  state = make_state(1)
  with Checkpoints(tmp_path, write=False) as checkpoints:
    part = {"params": state.params, "batch_stats": state.batch_stats}
    assert same(checkpoints.restore_latest(part, partial=True).state, part)
    with pytest.raises(InputError, match="opt_state"):
      checkpoints.restore_latest(part)


def test_restored_state_is_donated_in_place_and_compiles_the_step_once(tmp_path):
  """Fails when the arrays come back on one device or on a mesh of another name."""
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)
  step = pmap(lambda state, batch: jax.tree.map(lambda x: x + batch.sum().astype(x.dtype), state),
              donate_state=True)
  batch = np.ones((jax.local_device_count(), 2), np.float32)
  save_steps(tmp_path, [1])
  with Checkpoints(tmp_path) as checkpoints:
    state = checkpoints.restore_latest(make_state(1)).state
  kernel = state.params["conv"]["kernel"]
  compiled.clear()
  for _ in range(3):
    state = step(state, batch)
  jax.block_until_ready(state)
  assert kernel.is_deleted()
  assert len(compiled) == 1
  expected = make_state(1)
  expected = jax.tree.map(lambda x: x + 2 + 2 + 2, expected)
  assert same(state.params["bias"], expected.params["bias"])


def test_an_asynchronous_save_is_not_changed_by_donated_updates(tmp_path):
  """The memory that was saved from is overwritten while the save is under way.

  Fails when a save keeps a pointer to donated memory. The control proves that the updates do
  overwrite the memory of a state of which nobody holds a view.
  """
  update = pmap(lambda state, batch: jax.tree.map(lambda x: x * 3 + batch.sum().astype(x.dtype),
                                                  state), donate_state=True)
  batch = np.ones((jax.local_device_count(), 2), np.float32)

  def fresh(seed):
    state = jax.device_put({"large": jax.random.normal(jax.random.key(seed), (1000, 1000)),
                            "small": [jnp.full((30,), i + seed, jnp.float32) for i in range(20)],
                            "step": jnp.int32(seed)}, replicated())
    return update(state, batch)   # as in training, the saved state is itself a donated result

  def updated(state):
    for _ in range(6):
      state = update(state, batch)
    return jax.block_until_ready(state)

  state = jax.block_until_ready(fresh(0))
  address = state["large"].addressable_shards[0].data.unsafe_buffer_pointer()
  memory = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (1000, 1000))
  before = memory.copy()
  state = updated(state)
  assert not np.array_equal(memory, before)

  with Checkpoints(tmp_path) as checkpoints:
    for seed in range(10):
      state = fresh(seed)
      expected = jax.tree.map(lambda x: np.array(x + 0, copy=True), state)
      checkpoints.save(seed, state, ITERATOR, CONFIG)
      updated(state)
      assert same(checkpoints.restore_latest(expected).state, expected), seed


def test_the_step_after_a_save_has_the_memory_of_the_state(tmp_path):
  """Fails where a save holds the arrays, and not copies: donated, they cannot be written over."""
  update = pmap(lambda state, batch: state + batch.sum(), donate_state=True)
  batch = np.ones((jax.local_device_count(), 2), np.float32)
  state = update(jax.device_put(jnp.ones((1000, 1000)), replicated()), batch)
  address = state.addressable_shards[0].data.unsafe_buffer_pointer()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"large": state}, ITERATOR, CONFIG)
    after = update(state, batch)
  assert state.is_deleted()
  assert after.addressable_shards[0].data.unsafe_buffer_pointer() == address


def test_what_is_no_json_is_a_bug_and_no_full_disk(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(), ITERATOR, CONFIG)
    with pytest.raises(TypeError, match="not JSON serializable"):
      checkpoints.save(2, make_state(), ITERATOR, {"function": print})
    assert checkpoints.restore_latest(make_state()).step == 1


# ------------------------------------------------------------------------------------ which stay


@pytest.mark.parametrize(("keep", "metrics", "left", "best"), [
    (1, [1, 3, 2, 0], [1, 3], 1),
    (2, [1, 3, 2, 0, 1], [1, 3, 4], 1),
    (1, [1, 2, 3], [2], 2),
    (1, [2, None, None], [0, 2], 0),
    (1, [None, None, None], [2], None),
    (2, [None, 1, None], [1, 2], 1),
    (1, [1, float("nan"), float("nan")], [0, 2], 0),
    (1, [float("inf"), 0.1, 0.0], [1, 2], 1),
    (1, [0.5, 0.5, 0.1], [1, 2], 1),
])
def test_newest_and_best_stay(tmp_path, keep, metrics, left, best):
  """Without a metric, or with one that is no number, a checkpoint is never the best."""
  state = {"w": jnp.ones(3)}
  with Checkpoints(tmp_path, keep=keep, best_metric="top1") as checkpoints:
    for step, value in enumerate(metrics):
      checkpoints.save(step, state, ITERATOR, CONFIG, None if value is None else {"top1": value})
    assert checkpoints.steps() == left
    assert checkpoints.best_step() == best
  with Checkpoints(tmp_path, keep=keep, best_metric="top1") as checkpoints:
    assert checkpoints.steps() == left
    assert checkpoints.best_step() == best
    restored = checkpoints.restore_best(state)
    assert restored.step == (left[-1] if best is None else best)
    checkpoints.save(10, state, ITERATOR, CONFIG, {"top1": -1.0})
    assert (best is None) or best in checkpoints.steps()


# ----------------------------------------------------------------------------------- other errors


def test_another_network_is_refused_with_its_leaves(tmp_path):
  save_steps(tmp_path, [4, 5])
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(InputError) as error:
      checkpoints.restore_latest(make_state(width=41))
    message = str(error.value)
    assert "params/bias is float32[40] instead of float32[41]" in message
    assert message.count(" instead of ") <= 10
    many = {f"layer{i}": jnp.ones(2) for i in range(30)}
    with pytest.raises(InputError, match="layer0 is not there") as error:
      checkpoints.restore_latest(many, partial=True)
    assert error.value.args[0].count("not there") == 10
    assert "and 20 more" in error.value.args[0]
    integers = jax.tree.map(lambda x: x.astype(jnp.int32), make_state(5))
    with pytest.raises(InputError, match=r"bfloat16\[40\] instead of int32\[40\]"):
      checkpoints.restore_latest(integers)
    assert checkpoints.restore_latest(make_state()).step == 5   # and nothing was taken for damaged


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"file/checkpoints cannot be written .*--workdir"):
    Checkpoints(tmp_path / "file" / "checkpoints")
  with Checkpoints(tmp_path / "nowhere", write=False) as checkpoints:
    assert checkpoints.steps() == []
    assert checkpoints.restore_best({"w": jnp.ones(3)}) is None
  assert not (tmp_path / "nowhere").exists()


def test_a_disk_that_cannot_be_read_for_a_while_damages_nothing(tmp_path, monkeypatch):
  """Fails where an error of the disk is taken for the checkpoint's, and it is put aside."""
  save_steps(tmp_path, [1, 2])
  with Checkpoints(tmp_path) as checkpoints:
    with monkeypatch.context() as patch:
      def unread(path):
        raise OSError(errno.EIO, "Input/output error", str(path))
      patch.setattr(integrity, "_size_and_crc", unread)
      for restore in (checkpoints.restore_latest, lambda state: checkpoints.restore(2, state)):
        with pytest.raises(FaultError, match=r"2 cannot be read \(Input/output error\); start"):
          restore(make_state())
    assert checkpoints.restore_latest(make_state()).step == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(("number", "code"), [
    (errno.ENOSPC, 75), (errno.EIO, 75), (errno.EACCES, 2), (errno.EROFS, 2)])
def test_a_disk_that_is_still_full_at_the_start_may_be_tried_again(tmp_path, monkeypatch, number,
                                                                   code):
  """Fails where what starts jobs is told that a full disk is bad input."""
  def refuse(self, *args, **settings):
    raise OSError(number, os.strerror(number))

  for name, use in (("touch", lambda: make_workdir(str(tmp_path))),
                    ("write_bytes", lambda: Checkpoints(tmp_path / "checkpoints"))):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path if name == "touch" else type(epath.Path(tmp_path)), name, refuse)
      with pytest.raises(InputError, match=re.escape(os.strerror(number))) as error:
        use()
    assert error.value.code == code
    assert ("start again with the same command" in str(error.value)) == (code == 75)


DISK_FULL = """
import json, resource
import jax, jax.numpy as jnp
from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.errors import InputError
def state(seed):
  return {"w": jax.random.normal(jax.random.key(seed), (500, 500))}
errors = []
with Checkpoints(DIRECTORY, keep=1) as checkpoints:
  checkpoints.save(1, state(1), {}, {})
  checkpoints.wait()
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))   # bytes a file may have
  for step in (2, 3):
    checkpoints.save(step, state(step), {}, {})
    try:
      checkpoints.wait()
    except InputError as error:
      errors.append(str(error))
    whole = checkpoints.restore_latest(state(0))
    assert whole.step == 1 and (whole.state["w"] == state(1)["w"]).all()
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  checkpoints.save(3, state(3), {}, {})
  assert checkpoints.restore_latest(state(0)).step == 3
print(json.dumps(errors))
"""


def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_stay_whole(tmp_path):
  """Files are limited in size, as on a full disk; no traceback, and a later save succeeds."""
  process = run_python(DISK_FULL.replace("DIRECTORY", repr(str(tmp_path))))
  output, stderr = process.communicate()
  assert process.returncode == 0, stderr
  assert stderr == ""
  errors = json.loads(output)
  assert len(errors) == 2
  for step, error in zip((2, 3), errors, strict=True):
    assert error.startswith(f"The checkpoint of step {step} could not be written to {tmp_path} "
                            "(File too large); ")
    assert "free some space" in error
    assert error.endswith("(whole checkpoints there: 1).")
    assert "\n" not in error
  assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_threads_say_of_a_closed_loop_is_not_shown():
  """Fails where tracebacks of threads hide the sentence on a full disk, or others are hidden."""
  shown = []
  for error in (RuntimeError("Event loop is closed"), RuntimeError("other")):
    quiet._without_closed_loops(types.SimpleNamespace(exc_value=error), shown.append)
  assert [str(each.exc_value) for each in shown] == ["other"]
