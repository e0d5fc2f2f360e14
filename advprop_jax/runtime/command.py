"""What the command lines of this project share: flags that are wrong end in one sentence."""

import re
from collections.abc import Callable

from absl import flags

from advprop_jax.errors import InputError
from advprop_jax.runtime.config import require_known


def parse(argv: list[str], config: flags.FlagHolder,
          changed: Callable[[list[str]], list[str]] = list) -> list[str]:
  """Parses the flags; whatever is wrong with them or in the config file is the user's to mend.

  Args:
    argv: the command, program included.
    config: the flag of the config file.
    changed: the arguments as they are to be parsed, where the program knows better.

  Returns:
    What is no flag, the program first.

  Raises:
    InputError: a flag, a field of the config or its file is wrong.
  """
  for path in re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE):
    require_known(path)
  argv = changed(argv)
  try:
    rest = flags.FLAGS(argv)
    if config.value is not None:
      config.value.keys()  # a config file that could not be read says so only when it is used
    return rest
  except InputError:
    raise
  except (flags.Error, AttributeError, ImportError, KeyError, NameError, OSError, SyntaxError,
          TypeError, ValueError) as error:
    # Of a traceback that the error quotes, the last line says what is wrong.
    last = str(error).strip().splitlines()[-1].strip()
    raise InputError(re.sub(r"^\w+Error: |^\[Errno \d+\] ", "", last)) from error
