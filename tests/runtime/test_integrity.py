"""Checkpoints that were interrupted or damaged: never garbage, the one before is taken."""

import logging
import os
import pathlib
import random
import shutil
import time

import jax
import jax.numpy as jnp
import pytest

from advprop_jax.errors import InputError
from advprop_jax.runtime.checkpoint import Checkpoints
from tests.states import CONFIG, ITERATOR, all_files, make_state, run_python, same, save_steps


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
  """A process killed while it saves leaves a temporary folder; only a writer removes it."""
  save_steps(tmp_path, [1])
  temporary = tmp_path / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "1", temporary)
  with Checkpoints(tmp_path, write=False) as checkpoints:
    assert checkpoints.restore_latest(make_state()).step == 1
  assert temporary.exists()
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_latest(make_state()).step == 1
    assert checkpoints.save(2, make_state(2), ITERATOR, CONFIG)
    assert same(checkpoints.restore_latest(make_state()).state, make_state(2))
  assert not temporary.exists()


def test_killed_at_random_times_while_saving(tmp_path):
  """After SIGKILL there is always a whole checkpoint of a step that was saved, bit for bit."""
  code = f"""
import jax, jax.numpy as jnp
from advprop_jax.runtime.checkpoint import Checkpoints
with Checkpoints({str(tmp_path)!r}) as checkpoints:
  restored = checkpoints.restore_latest({{"w": jnp.zeros((300, 300)), "step": jnp.int32(0)}})
  step = restored.step if restored else 0
  while True:
    step += 1
    w = jax.random.normal(jax.random.key(step), (300, 300))
    checkpoints.save(step, {{"w": w, "step": jnp.int32(step)}}, {{"step": step}}, {{}})
    print(step, flush=True)
"""
  abstract = {"w": jnp.zeros((300, 300)), "step": jnp.int32(0)}
  last = 0
  for seed in range(3):
    process = run_python(code)
    for _ in range(3):
      assert process.stdout.readline(), process.stderr.read()
    time.sleep(random.Random(seed).random() / 10)
    process.kill()
    printed = process.communicate()[0].split()
    with Checkpoints(tmp_path, write=False) as checkpoints:
      restored = checkpoints.restore_latest(abstract)
    assert restored.step > last
    last = restored.step
    # the save that was announced last may not be whole, the one before it must be
    assert not printed or last >= int(printed[-1]) - 1
    assert restored.iterator == {"step": last}
    assert same(restored.state, {"w": jax.random.normal(jax.random.key(last), (300, 300)),
                                 "step": jnp.int32(last)})


def damage_half(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def damage_empty(path: pathlib.Path) -> None:
  os.truncate(path, 0)


def damage_one_byte(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x55
  path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [damage_half, damage_empty, damage_one_byte, pathlib.Path.unlink])
def test_damage_to_any_file_means_fallback_or_the_same_bits(tmp_path, caplog, damage):
  """Every file of the newest checkpoint in turn.

  Fails without the list of checksums: Orbax restores other numbers from one changed byte.
  """
  whole, directory = tmp_path / "whole", tmp_path / "checkpoints"
  save_steps(whole, [4, 5])
  expected = {step: make_state(step) for step in (4, 5)}
  files = all_files(whole / "5")
  assert len(files) > 10
  fallbacks = 0
  for file in files:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(whole, directory)
    damage(directory / "5" / file)
    caplog.clear()
    with Checkpoints(directory, keep=2) as checkpoints:
      restored = checkpoints.restore_latest(expected[5])
      assert same(restored.state, expected[restored.step]), file
      assert restored.iterator == ITERATOR | {"step": restored.step}, file
      assert restored.config == CONFIG, file
      if restored.step == 5:
        assert len(file.parts) == 1, file   # Orbax's own notes beside the items
        continue
      fallbacks += 1
      (record,) = caplog.records
      assert record.levelno == logging.WARNING
      message = record.getMessage()
      assert str(directory / "5") in message
      assert file.name in message or file.name == "files.json"
      assert "falling back to step 4" in message
      assert (directory / "5.damaged").is_dir()
      assert checkpoints.steps() == [4]
  assert fallbacks == len([file for file in files if len(file.parts) > 1]) + 1   # + files.json


def test_training_goes_on_after_a_fallback(tmp_path):
  """The step of a damaged checkpoint can be saved again, and damaged again."""
  save_steps(tmp_path, [4, 5])
  for seed in (6, 7):
    damage_half(tmp_path / "5" / "config" / "metadata")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
      assert checkpoints.restore_latest(make_state()).step == 4
      assert checkpoints.save(5, make_state(seed), ITERATOR, CONFIG)
      assert same(checkpoints.restore_latest(make_state()).state, make_state(seed))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5", "5.damaged", "5.damaged1"]


def test_a_damaged_best_falls_back_to_the_next_best(tmp_path):
  state = {"w": jnp.ones(3)}
  with Checkpoints(tmp_path, keep=3, best_metric="top1") as checkpoints:
    for step, top1 in enumerate([0.2, 0.9, 0.1]):
      checkpoints.save(step, state, ITERATOR, CONFIG, {"top1": top1})
  damage_one_byte(tmp_path / "1" / "state" / "_METADATA")
  with Checkpoints(tmp_path, best_metric="top1", write=False) as checkpoints:
    assert checkpoints.restore_best(state).step == 0
    assert checkpoints.restore_latest(state).step == 2
    with pytest.raises(InputError, match="_METADATA has changed"):
      checkpoints.restore(1, state)
    with pytest.raises(InputError, match=r"no checkpoint of step 8 .*there: 0, 1, 2"):
      checkpoints.restore(8, state)
  assert (tmp_path / "1").is_dir()   # who only reads moves nothing


def test_nothing_readable_is_an_error_that_names_the_directory(tmp_path):
  save_steps(tmp_path, [4, 5])
  damage_half(tmp_path / "4" / "state" / "manifest.ocdbt")
  (tmp_path / "5" / "files.json").unlink()
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(InputError) as error:
      checkpoints.restore_latest(make_state())
    assert str(tmp_path) in str(error.value)
    assert "step 5: files.json is missing" in str(error.value)
    assert "step 4: state/manifest.ocdbt has" in str(error.value)
    assert "\n" not in str(error.value)
  assert (tmp_path / "4").is_dir()
  assert (tmp_path / "5").is_dir()
