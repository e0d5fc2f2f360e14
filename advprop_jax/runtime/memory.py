"""Memory on the CPU: how a program gets it, up to half of a step's time, and how remat saves it."""

import ctypes
import importlib.util
import os
from importlib import metadata

import jax

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = 2**31 - 1
_SPARE = 2**28
_KEEP_BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"


def keep_freed_memory() -> bool:
  """Makes what XLA frees on the CPU stay with this process, in place of going back to the system.

  XLA allocates the temporaries of a program afresh at each call. By default glibc maps each large
  block anew, so that every page of every step is faulted in and cleared by the kernel. Only the
  main thread's heap can keep such blocks, so it is the main thread that must ask for them: on the
  CPU a program then runs in the call that starts it. (One heap for all threads would do as well,
  and was 1.6 times slower: its free list is full of what the compiler left, and each of the small
  blocks of a step is looked for in there.)

  The process keeps its peak memory until it ends, on hosts of other platforms too. Call it before
  JAX's first computation. Measured: tests/benchmarks/README.md.

  Returns:
    Whether it was set: False where the C library is not glibc, or refuses.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  # Where the first is refused, as by an older glibc, the others would make it worse.
  if not mallopt(_MMAP_THRESHOLD, _NEVER):
    return False
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return all([mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_TOP_PAD, _SPARE)])


def keep_barriers() -> bool:
  """Makes XLA keep optimization barriers on the CPU, which `jax.checkpoint` needs (model.remat).

  By default it drops them there, finds that a block and its second computation are the same, and
  keeps what was to be computed again: with them EfficientNet-B0's step needs 0.38 of the memory,
  without them all of it (tests/benchmarks/README.md). A program without barriers is the same either
  way. Call it before JAX's first computation.

  Returns:
    Whether it has asked for that: not where there may be another platform than the CPU, as the flag
    would be for all, nor where XLA_FLAGS has passes of its own to leave out, or names a file.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  is_file = flags.strip() and not flags.strip().startswith("-")
  if is_file or "xla_disable_hlo_passes" in flags or not _is_cpu_only():
    return False
  os.environ["XLA_FLAGS"] = f"{flags} {_KEEP_BARRIERS}"
  return True


def _is_cpu_only() -> bool:
  """Whether JAX has the CPU alone to run on; asking JAX itself would make it read its flags."""
  if jax.config.jax_platforms:
    return jax.config.jax_platforms == "cpu"
  return not (any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
              or metadata.entry_points(group="jax_plugins"))
