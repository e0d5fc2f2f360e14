"""What may happen to a run: a machine taken away, a disk that is full, a loss that is no number.

A pod learns of the first by JAX's preemption notice, which is SIGTERM on any of its processes, and
agrees on the step to stop after; one process alone hears the signal itself.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from jax.experimental import multihost_utils

from advprop_jax.errors import InputError
from advprop_jax.runtime import agreement

RESUME = "resume with the same command"


class Preempted(BaseException):
  """The run was asked to end, and nothing is lost; the message says how far it came.

  It may come anywhere, and no `except Exception` is to take it for a failure of what it interrupts.
  """


def leave(code: int) -> NoReturn:
  """Ends this process at once, where Python's own way would wait for threads or other processes.

  Args:
    code: its exit code, or minus the signal that it is to have died of.
  """
  try:
    sys.stdout.flush()
    sys.stderr.flush()
  finally:                             # also where nobody reads any more
    if code < 0:
      signal.signal(-code, signal.SIG_DFL)
      signal.raise_signal(-code)
    os._exit(code)


class NotFinite(InputError):
  """The loss of a step, or its gradient, is infinite or not a number.

  Attributes:
    what: the message without advice.
    step: which one.
    batches: how many batches of the data's stream were taken up to that step, itself included.
  """

  def __init__(self, message: str, what: str, step: int, batches: int):
    super().__init__(message)
    self.what, self.step, self.batches = what, step, batches


@contextlib.contextmanager
def warned_of(goes_on: bool, say: Callable[[str], None]) -> Iterator[None]:
  """Makes an InputError within a warning, where the training is to go on."""
  try:
    yield
  except InputError as error:
    if not goes_on:
      raise
    say(f"Warning: {error}")


class Preemption:
  """SIGTERM while it is entered: noted, for loops to ask; with one process `at_once` raises it.

  Outside of the main thread, which alone hears signals, it does nothing.
  """

  def __init__(self):
    self._noticed, self._asked, self._before = False, 0, None

  def __enter__(self) -> "Preemption":
    if agreement.store() is None:   # in a pod JAX listens
      self._handle(self._notice)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _handle(self, handler) -> None:
    if threading.current_thread() is threading.main_thread():
      before = signal.signal(signal.SIGTERM, handler)
      if self._before is None:         # None again: a handler that was not set from Python
        self._before = signal.SIG_DFL if before is None else before

  def _notice(self, number: int, frame: FrameType | None) -> None:
    self._noticed = True

  def reached(self) -> bool:
    """Whether to end now; all processes ask at the same points, and get the same answer."""
    self._asked += 1                # not the step, which may go back
    if agreement.store() is None:
      return self._noticed
    # JAX says so once.
    reached = multihost_utils.reached_preemption_sync_point(self._asked)
    self._noticed = self._noticed or reached
    return self._noticed

  def at_once(self) -> None:
    """From now on the signal raises Preempted where it strikes: there is no step to finish.

    In a pod it still waits for all to ask: one that ends alone would be missed by the others.
    """
    if agreement.store() is None:
      self._handle(self._strike)
    if self._noticed:
      self._strike()

  def end_if_reached(self) -> None:
    """Raises Preempted where `reached`."""
    if self.reached():
      self._strike()

  def _strike(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
    self._noticed = True               # what is raised in a callback of Python's may be lost there
    raise Preempted(f"Stopped before the results were complete; {RESUME}")
