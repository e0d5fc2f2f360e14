"""What Orbax and its libraries say of a save that fails, besides what they raise.

The user gets one sentence, from the error that is raised.
"""

import logging
import sys
import warnings

from absl import logging as absl_logging


def quiet_orbax() -> None:
  """Keeps it from the log and from stderr; calling it again changes nothing."""
  for logger in ("absl", "asyncio"):
    logging.getLogger(logger).addFilter(_without_orbax)
  sys.unraisablehook = _without_closed_loops
  warnings.filterwarnings("ignore", "coroutine .*write_fragment' was never awaited")


def _without_orbax(record: logging.LogRecord) -> bool:
  """Lets no record of Orbax pass unless absl is to log INFO (--verbosity=0).

  Orbax logs every failure with its traceback before it raises it, and asyncio those of Orbax's
  tasks that came after the first.
  """
  of_orbax = "orbax" in record.pathname or "orbax" in record.getMessage()
  return not of_orbax or absl_logging.get_verbosity() >= absl_logging.INFO


def _without_closed_loops(unraisable, show=sys.unraisablehook) -> None:
  """Shows what could not be raised, but for what TensorStore's threads say of a save that failed.

  They report to an event loop that Orbax has closed at the first failure.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    show(unraisable)
