"""Compiled programs are kept for the next start, unless someone says otherwise."""

import os
import subprocess
import sys

import pytest

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


def started(home, **environment):
  """What the program prints: its result, the folder and the size, how many programs were found."""
  names = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
  inherited = {name: value for name, value in os.environ.items() if name not in names}
  done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True,
                        check=True, env={**inherited, "HOME": str(home), **environment})
  return done.stdout.splitlines()


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
  """Fails where nothing is kept, there is no limit to it, or the result is another one."""
  first, second = started(tmp_path), started(tmp_path)
  assert first[:2] == second[:2]
  assert first[1].startswith(str(tmp_path / ".cache/advprop_jax/compiled-"))
  assert int(first[1].split()[1]) == 2 * 2**30
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
