"""Memory on the CPU: how a program gets it is up to half of a step's time."""

import contextlib
import ctypes

import jax

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = 2**31 - 1
_SPARE = 2**28
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 0.1                            # seconds; shorter ones leave little


def keep_freed_memory() -> bool:
  """Makes what XLA frees on the CPU stay with this process, in place of going back to the system.

  XLA allocates the temporaries of a program afresh at each call. By default glibc maps each large
  block anew, so that every page of every step is faulted in and cleared by the kernel. Only the
  main thread's heap can keep such blocks, so it is the main thread that must ask for them: on the
  CPU a program of one device then runs in the call that starts it. (One heap for all threads would
  do as well, and was 1.6 times slower: its free list is full of what the compiler left, and each of
  the small blocks of a step is looked for in there.)

  What the compiler leaves goes back to the system after each compilation, or loading of a compiled
  program: some hundreds of MiB. All else stays until the process ends, on hosts of other platforms
  too. Call it before JAX's first computation. Measured: tests/benchmarks/README.md.

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
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, seconds, **_: event == _COMPILED and seconds > _LONG and give_back())
  return all([mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_TOP_PAD, _SPARE)])


def give_back() -> None:
  """Gives what is free in the heaps back to the system; nothing where there is no glibc."""
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)
