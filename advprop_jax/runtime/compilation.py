"""Compiled programs that outlive the process: a second start does not compile again."""

import hashlib
import os
import pathlib
import platform

import jax

MAX_BYTES = 2 * 2**30                  # the programs that were used longest ago go first
MIN_SECONDS = 0.5                      # of compiling; shorter ones are not worth a file


def keep_compiled() -> pathlib.Path | None:
  """Lets JAX keep compiled programs in the user's cache folder.

  JAX' own settings win: JAX_COMPILATION_CACHE_DIR for another folder,
  JAX_ENABLE_COMPILATION_CACHE=false for none, JAX_COMPILATION_CACHE_MAX_SIZE in bytes. Call it
  before anything is compiled.

  Returns:
    The folder; None where there is none, or one of the user's own.
  """
  if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
    return None
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = pathlib.Path(home, "advprop_jax", f"compiled-{_processor()}")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:                      # a home that cannot be written: compile each time
    return None
  if not os.access(folder, os.W_OK):
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
  if jax.config.jax_compilation_cache_max_size < 0:
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
  return folder


def _processor() -> str:
  """Tells processors apart: programs for the CPU use what the one that they were made on has."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    features = next(line for line in lines if line.startswith(("flags", "Features")))
  except (OSError, StopIteration):
    features = platform.processor()
  return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
