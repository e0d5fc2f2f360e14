"""The exceptions that a user or a machine, and no bug, causes."""


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
