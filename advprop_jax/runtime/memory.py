"""How a CPU program gets its memory, which is up to half of a train step's time."""

import ctypes

import jax

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = 2**31 - 1
_SPARE = 2**28


def keep_freed_memory() -> bool:
  """Makes what XLA frees on the CPU stay with this process, in place of going back to the system.

  XLA allocates the temporaries of a program afresh at each call. By default glibc maps each large
  block anew, so that every page of every step is faulted in and cleared by the kernel. Only the
  main thread's heap can keep such blocks, so it is the main thread that must ask for them: on the
  CPU a program then runs in the call that starts it. (One heap for all threads would do as well,
  and was 1.6 times slower: its free list is full of what the compiler left, and each of the small
  blocks of a step is looked for in there.)

  The process keeps its peak memory until it ends. Call it before JAX's first computation; it
  changes nothing on other platforms. Measured: tests/benchmarks/README.md.

  Returns:
    Whether there was anything to set: False where the C library is not glibc.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return all([mallopt(_MMAP_THRESHOLD, _NEVER), mallopt(_TRIM_THRESHOLD, _NEVER),
              mallopt(_TOP_PAD, _SPARE)])
