"""The one exception that a user, and no bug, causes."""


class InputError(Exception):
  """Bad input: the message is one sentence that names the field, the value and what would do.

  `advprop_jax.main` prints the message without a traceback and exits with code 2.
  """


class LocalError(InputError):
  """Bad input that one process of a pod met while the others go on: the pod cannot."""
