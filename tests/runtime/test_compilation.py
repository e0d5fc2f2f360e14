"""Compiled programs are kept for the next start, unless someone says otherwise."""

import gc
import math
import os
import subprocess
import sys
import threading
import time
import types
from concurrent import futures

import jax
import numpy as np
import pytest
from jax._src.config import persistent_cache_min_compile_time_secs

from advprop_jax.runtime import compilation
from tests import pods
from tests.conftest import ROOT

PROGRAM = """
import jax, jax.numpy as jnp
from advprop_jax.runtime import compilation
compilation.MIN_SECONDS = 0.0
folder = compilation.keep_compiled()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x))(jnp.ones((8, 8)))))
print(folder, jax.config.jax_compilation_cache_max_size)
print(sum("cache_hit" in name for name in hits))
"""


def printed(program, home, **environment):
  """What a program prints in a process of its own, with an empty cache or one in this home."""
  names = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
  inherited = {name: value for name, value in os.environ.items() if name not in names}
  # -B: a source file of the same size, changed within a second, would be taken from the byte code.
  done = subprocess.run([sys.executable, "-B", "-c", program], cwd=ROOT, capture_output=True,
                        text=True, env={**inherited, "HOME": str(home), **environment})
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def started(home, **environment):
  """Its result, the folder and the size, how many programs were found."""
  return printed(PROGRAM, home, **environment)


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
  """Fails where nothing is kept, there is no limit to it, or the result is another one."""
  first, second = started(tmp_path), started(tmp_path)
  assert first[:2] == second[:2]
  assert first[1].startswith(str(tmp_path / ".cache/advprop_jax/compiled-"))
  assert int(first[1].split()[1]) == 2**30
  assert (int(first[2]), int(second[2]) > 0) == (0, True)


@pytest.mark.parametrize("environment", [
    {"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}])
def test_the_users_word_wins(tmp_path, environment):
  """Fails where a cache that is switched off, or is elsewhere, is set all the same."""
  if "JAX_COMPILATION_CACHE_DIR" in environment:
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere")}
  assert started(tmp_path, **environment)[1].startswith("None ")
  assert not (tmp_path / ".cache").exists()


def test_a_home_that_cannot_be_written(tmp_path):
  """Fails where that stops a run."""
  (tmp_path / ".cache").write_text("a file")
  assert started(tmp_path)[1].startswith("None ")


# Prints how often it was traced and compiled, and the sum of what it gives.
KEPT = """
import sys
sys.path.insert(0, {folder!r})
import jax, numpy as np
import made, {more}
from advprop_jax.runtime import compilation, parallel
compilation._SETTLED = {settled}
compilation.keep_compiled()
calls = {{"traced": 0, "compiled": 0}}
def step(state, batch):
  calls["traced"] += 1
  return made.changed(state, jax.lax.pmean(batch[{key!r}].mean(), parallel.AXIS))
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: calls.update(compiled=calls["compiled"] + ("backend_compile" in name)))
state = jax.device_put({{"w": np.ones({width}, np.float32)}}, parallel.replicated())
batch = {{{key!r}: np.arange(8, dtype=np.float32).reshape(4, 2)}}
jax.block_until_ready(state)
calls["compiled"] = 0
step = compilation.Program(parallel.pmap(step, donate_state=True), "step", {made_of})
if {start}:
  given = step.start(parallel.replicated_shapes(state), batch)
  assert calls["traced"] <= 1 and given["w"].shape == ({width},), given
new = step(step(state, batch), batch)
assert state["w"].is_deleted()
print(calls["traced"], calls["compiled"], float(new["w"].sum()))
"""
MADE = "def changed(state, mean): return {{'w': state['w'] * {factor} + mean}}  # {note}\n"


def kept(folder, factor=2, note="", made_of=None, width=3, settled=-60, more="json", key="x",
         start=False):
  """Times traced, times compiled, result of a start whose code is that."""
  (folder / "made.py").write_text(MADE.format(factor=factor, note=note))
  program = KEPT.format(folder=str(folder), made_of=made_of or {"seed": 0}, width=width,
                        settled=settled, more=more, key=key, start=start)
  line, = printed(program, folder, XLA_FLAGS="--xla_force_host_platform_device_count=4")
  traced, compiled, result = line.split()
  return int(traced), int(compiled), float(result)


# Twice, on four devices: 1 -> 1 * 2 + 3.5 = 5.5 -> 5.5 * 2 + 3.5 = 14.5, three of them.
RESULT = 43.5
NEW, TRACED, FOUND = (1, 1, RESULT), (1, 0, RESULT), (0, 0, RESULT)


def test_a_program_is_found_without_tracing(tmp_path):
  """Fails where a later start traces, or where it takes what was made of anything else."""
  assert kept(tmp_path) == NEW
  assert kept(tmp_path) == FOUND
  assert kept(tmp_path, note="changed") == TRACED          # other code that gives the same program
  assert kept(tmp_path, note="changed") == FOUND
  assert kept(tmp_path, factor=3) == (1, 1, 3 * (3 * 6.5 + 3.5))
  assert kept(tmp_path, made_of={"seed": 1}, factor=3) == (1, 0, 3 * (3 * 6.5 + 3.5))
  assert kept(tmp_path, width=2) == (1, 1, 2 * 14.5)
  assert kept(tmp_path, key="y") == NEW                    # it would not take the argument


def test_a_program_that_was_started_with_shapes_is_the_one_of_the_call(tmp_path):
  """Fails where `start` makes a call trace again, or looks for another program than a call."""
  assert kept(tmp_path, start=True) == NEW
  assert kept(tmp_path) == FOUND
  assert kept(tmp_path, start=True) == FOUND
  assert len(list(tmp_path.glob(".cache/advprop_jax/programs-*/*"))) == 2


class Lowered:
  """What lowering gives, of which a test says how it compiles."""

  out_info = "its shapes"

  def __init__(self, compile_it):
    self.compile = compile_it

  def as_text(self):
    return "its text"


def a_program(compile_it, lower=None):
  return compilation.Program(
      types.SimpleNamespace(lower=lower or (lambda *args: Lowered(compile_it))), "name", {})


def test_start_does_not_wait(monkeypatch):
  """Fails where what follows `start` waits for the compiler, or a call does not."""
  monkeypatch.setattr(compilation, "_folders", [])
  may_end, ended = threading.Event(), []

  def compile_it():
    assert may_end.wait(60)
    ended.append(True)
    return lambda x: x + 1

  program = a_program(compile_it)
  assert program.start(1) == "its shapes"
  assert not ended
  threading.Timer(0.1, may_end.set).start()
  assert program(1) == 2
  assert ended


def test_a_compiler_that_fails_is_heard_of(monkeypatch):
  """Fails where a call hangs, or goes on without a program."""
  monkeypatch.setattr(compilation, "_folders", [])

  def fails():
    raise RuntimeError("no such instruction")

  program = a_program(fails)
  program.start()
  with pytest.raises(RuntimeError, match="no such instruction"):
    program()


def test_garbage_is_looked_for_again_after_a_trace_that_fails(monkeypatch):
  """Fails where a memory that only grows is what a failed trace leaves."""
  monkeypatch.setattr(compilation, "_folders", [])
  looked = []

  def lower():
    looked.append(gc.isenabled())
    raise ValueError("shapes")

  with pytest.raises(ValueError, match="shapes"):
    a_program(None, lower).start()
  assert (looked, gc.isenabled()) == ([False], True)


def test_only_what_is_kept_here_is_not_kept_by_jax():
  """Fails where JAX keeps nothing of other threads while a program is compiled, or afterwards, or
  where a program of theirs that JAX has found is taken for this one."""
  setting, program = persistent_cache_min_compile_time_secs, jax.jit(lambda: 1).lower().compile()
  before, seen = setting.get_global(), []

  def compile_it():
    with futures.ThreadPoolExecutor(1) as other:
      other.submit(jax.monitoring.record_event, compilation._FOUND).result()
      seen.extend([setting.value, other.submit(lambda: setting.value).result()])
    return program

  assert compilation._compiled(Lowered(compile_it)) == (program, True)
  assert seen == [math.inf, before]
  assert setting.value == before


@pytest.mark.parametrize("found", [False, True])
def test_what_jax_has_kept_is_not_written(found, tmp_path, monkeypatch):
  """Fails where a program is written that JAX has loaded, and so is not whole, or a new one not."""
  program, given, written = jax.jit(lambda: 1).lower().compile(), [], []
  monkeypatch.setattr(compilation, "_write", lambda *args: written.append(args))

  def compile_it():
    if found:
      jax.monitoring.record_event(compilation._FOUND)
    return program

  compilation._keep(Lowered(compile_it), tmp_path / "file", None, given.append)
  assert given == [program]
  assert len(written) == (not found)


def test_a_program_runs_before_it_is_written(tmp_path, monkeypatch):
  """Fails where a first step waits for its program's file, or a process may end without it."""
  may_write, written = threading.Event(), threading.Event()
  monkeypatch.setattr(compilation, "_folders", [tmp_path])
  monkeypatch.setattr(compilation, "_write_program",
                      lambda file, program: may_write.wait(60) and written.set())
  program = a_program(lambda: lambda x: x + 1)
  program.start(1)
  assert program(1) == 2
  assert (written.is_set(), compilation.is_compiling()) == (False, False)
  assert [one.daemon for one in threading.enumerate() if one.name == "compiles"] == [False]
  may_write.set()
  assert written.wait(60)


def test_what_fails_after_a_program_was_given_is_heard_of(monkeypatch):
  """Fails where a thread that is to write a program ends without a word."""
  heard = threading.Event()
  monkeypatch.setattr(threading, "excepthook", lambda error: heard.set())

  def work(give):
    give("the program")
    raise RuntimeError("cannot be written")

  assert compilation._beside(work).result() == "the program"
  assert heard.wait(60)


OF_ONE_DEVICE = """
import jax
from advprop_jax.runtime import compilation, parallel
compilation._SETTLED = -60
compilation.keep_compiled()
traced = []
def create():
  traced.append(1)
  return jax.numpy.arange(3) * 2
print(int(compilation.Program(parallel.hurried(create), "one", {})().sum()),
      jax.local_device_count(), len(traced))
"""


def test_a_program_of_one_of_several_devices_is_found(tmp_path):
  """Fails where it is loaded as a program of all, which cannot be called: a fresh state is one."""
  four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  assert printed(OF_ONE_DEVICE, tmp_path, **four) == ["6 4 1"]
  assert printed(OF_ONE_DEVICE, tmp_path, **four) == ["6 4 0"]


def test_what_nobody_knows_what_it_is_made_of_is_found_by_its_trace(tmp_path):
  """Fails where it is compiled again, or found where a trace would have given another program."""
  assert kept(tmp_path, made_of="None") == NEW
  assert kept(tmp_path, made_of="None") == TRACED
  assert kept(tmp_path, made_of="None", factor=3) == (1, 1, 3 * (3 * 6.5 + 3.5))


def test_code_that_nobody_knew_is_not_trusted(tmp_path):
  """Fails where a package that is loaded in one of two starts may change the other's program."""
  (tmp_path / "patch.py").write_text(
      "import made\nmade.changed = lambda state, mean: {'w': state['w'] + mean}\n")
  assert kept(tmp_path) == NEW
  assert kept(tmp_path, more="patch") == (1, 1, 24.0)
  assert kept(tmp_path) == FOUND


def test_code_that_has_just_changed_is_traced_again(tmp_path):
  """Or what is loaded may be what was in a file before: its program is not that of its bytes."""
  assert kept(tmp_path, settled=10) == NEW
  assert kept(tmp_path, settled=10) == TRACED
  assert kept(tmp_path) == TRACED
  assert kept(tmp_path, settled=10) == TRACED              # though there is one of these bytes


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2],
                                    lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_program_is_compiled_again(tmp_path, damage):
  """Fails where that ends a start."""
  assert kept(tmp_path) == NEW
  program, = (tmp_path / ".cache/advprop_jax").glob("programs-*/*.program")
  program.write_bytes(damage(program.read_bytes()))
  assert kept(tmp_path) == NEW
  assert kept(tmp_path) == FOUND


def test_what_was_used_longest_ago_goes(tmp_path, monkeypatch):
  """Fails where the folder grows without an end."""
  monkeypatch.setattr(compilation, "MAX_BYTES", 25)
  for name, age in {"old": 3, "new": 1, "used": 2}.items():
    (tmp_path / name).write_bytes(bytes(10))
    os.utime(tmp_path / name, (time.time() - age,) * 2)
  compilation._forget_oldest(tmp_path)
  assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "used"]


def test_a_training_with_a_found_program_has_the_same_bits(tmp_path):
  """Fails where it takes another's program, or where one that was written is not what was."""
  def trained(name, **environment):
    pods.run(pods.single(tmp_path / name, "--config.train.steps=3"), tmp_path,
             JAX_COMPILATION_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path), **environment)
    return jax.tree.leaves(pods.newest(tmp_path / name).state)

  plain = trained("plain", JAX_ENABLE_COMPILATION_CACHE="false")
  assert not list(tmp_path.glob("advprop_jax/*"))
  first = trained("first")
  programs = list(tmp_path.glob("advprop_jax/programs-*/*.program"))
  written = {program: program.stat().st_ino for program in programs}
  assert {file.name.split("-")[0] for file in written} == {
      "fresh_state", "train_step", "shown_step", "measure_step"}
  second = trained("second")
  programs = list(tmp_path.glob("advprop_jax/programs-*/*.program"))
  assert {program: program.stat().st_ino for program in programs} == written
  for state in (first, second):
    for a, b in zip(plain, state, strict=True):
      np.testing.assert_array_equal(a, b)
