"""Memory on the CPU, in a process of its own: how the C library keeps it is set once."""

import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# 512 MiB of small blocks, freed, and then a compilation that takes its time.
PROGRAM = """
import ctypes, os
from advprop_jax.runtime.memory import keep_freed_memory
assert keep_freed_memory()
import jax, jax.numpy as jnp
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [library.malloc(4096) for _ in range(2**17)]
for block in blocks: ctypes.memset(block, 1, 4096)
for block in blocks[:-1]: library.free(block)
kept = resident()
def deep(x):
  for i in range(400): x = jnp.sin(x) @ x + i
  return x
jax.jit(deep).lower(jnp.ones((8, 8))).compile()
print(kept - resident())
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_is_left_after_a_compilation_goes_back():
  """Fails where JAX has another name for the event that ends a compilation."""
  done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
                        cwd=ROOT)
  assert int(done.stdout) > 2**28
