"""How the C library hands out memory, which is half of a train step's time on the CPU."""

import ctypes

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
  """Makes malloc keep what is freed, in place of giving it back to the system.

  XLA allocates the temporaries of a program afresh at each call. By default glibc maps each large
  block anew, so that every page of every step is faulted in and cleared by the kernel; a step of
  EfficientNet-tiny took twice as long (tests/benchmarks/step.py --malloc). The process then keeps
  its peak memory until it ends. Call it before the first large allocation.

  Returns:
    Whether there was anything to set: False where the C library is not glibc.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  return all([mallopt(_MMAP_THRESHOLD, _NEVER), mallopt(_TRIM_THRESHOLD, _NEVER),
              mallopt(_ARENA_MAX, 1)])
