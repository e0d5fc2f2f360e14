"""The exceptions that a user or a machine, and no bug, causes."""

import errno
import os
import re

# What a system says of a disk that may be another after a while: full, or away for a moment.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT,
            errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EHOSTDOWN, errno.EHOSTUNREACH}


class InputError(Exception):
  """Bad input: the message is one sentence that names the field, the value and what would do.

  `advprop_jax.main` prints the message without a traceback and exits with `code`.
  """

  code = 2


class LocalError(InputError):
  """Bad input that one process of a pod met while the others go on: the pod cannot."""


class FaultError(InputError):
  """What may have passed when the same command is started again, such as a disk that was full."""

  code = 75                            # EX_TEMPFAIL of sysexits.h: who starts jobs may try again


def of_disk(error: OSError, what: str, advice: str) -> InputError:
  """The error to raise where a disk cannot be used: a FaultError where that may pass.

  Args:
    error: what the system said.
    what: "FIELD: cannot be used", without a reason.
    advice: what would do where it does not pass.
  """
  what = f"{what} ({brief(error)})"
  if error.errno in _PASSING:
    return FaultError(f"{what}; start again with the same command when that has passed, or "
                      f"{advice}")
  return InputError(f"{what}; {advice}")


def brief(error: BaseException) -> str:
  """What went wrong in a few words: the system's own, or the first line of the message."""
  code = re.search(r"os_error_code='(\d+)'", str(error))   # deep in what TensorStore has to say
  if code:
    return os.strerror(int(code[1]))
  text = getattr(error, "strerror", None) or str(error) or type(error).__name__
  line = text.strip().splitlines()[0]
  return line if len(line) <= 200 else line[:200] + "..."
