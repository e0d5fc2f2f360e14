"""Batches made in worker processes, in the order in which one process would make them.

Of W workers, the w-th makes batches w, w + W, w + 2W, ..., each by threads of its own, and they are
taken in turn. A batch goes through memory that is shared for the whole life of a worker.

Grain's own way, `mp_prefetch`, has the same order, but its workers live on for ever where the run
is killed, named blocks of shared memory are left over (with a warning at every other end), and it
refuses to work where absl has not parsed the command line. All as of Grain 0.2.18.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import pickle
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from typing import Any

import grain
import numpy as np

from advprop_jax.errors import FaultError

Batch = dict[str, np.ndarray]
Finish = Callable[[Batch], Any]

SLOTS = 2                              # batches that a worker may leave before one is taken
ALIGNMENT = 64                         # bytes
_REASONS = {
    "SIGKILL": "as the system does where memory runs out: give fewer workers, or smaller batches",
    "SIGBUS": "as happens where shared memory (/dev/shm) is full: give it more, or fewer workers",
}


class WorkerBatches(Iterator[Batch]):
  """What iterating over batches[first:] gives, made by workers, and finished here.

  Each array is the caller's.
  """

  def __init__(self, batches: grain.MapDataset, first: int, example: Batch, num_workers: int,
               num_threads: int, finish: Finish):
    """Starts the workers: about two seconds until the first batch, most of them imports.

    Args:
      batches: can be pickled.
      first: the batch to begin with.
      example: a batch whose shapes and types are those of all.
      num_workers: 1 or more processes.
      num_threads: of each, that read ahead; 0: it makes one batch after the other.
      finish: what is done with a batch that is taken.
    """
    self._finish = finish
    self._length, self._taken = len(batches) - first, 0
    context = multiprocessing.get_context("spawn")     # a fork would copy JAX' threads' locks
    places, size = _places(example)
    # All in one, so that it is on disk as a whole where shared memory is too small for it. It has
    # no name: whatever dies, nothing is left over.
    memory = RawArray(ctypes.c_uint8, num_workers * SLOTS * size)
    slots = np.frombuffer(memory, np.uint8).reshape(num_workers, SLOTS, size)
    self._slots = [[_views(slot, places) for slot in own] for own in slots]
    self._workers: list[tuple[Any, Connection]] = []
    self._end = weakref.finalize(self, _end_all, self._workers)   # at the exit, at the latest
    for worker in range(num_workers):
      ours, theirs = context.Pipe()
      process = context.Process(target=_work, args=(theirs, memory, worker, num_workers, places),
                                name=f"data worker {worker}", daemon=True)
      with _deaf_to(signal.SIGTERM):   # as the worker is until it can be by itself
        process.start()
      theirs.close()                   # or the end of the worker would not be the end of the pipe
      self._workers.append((process, ours))
    everything = pickle.dumps((batches, first, num_threads))
    for worker in range(num_workers):
      with self._explained(worker):
        self._workers[worker][1].send_bytes(everything)

  def __next__(self) -> Batch:
    if self._taken == self._length:
      raise StopIteration
    turn, worker = divmod(self._taken, len(self._workers))
    _, connection = self._workers[worker]
    with self._explained(worker):
      error = connection.recv()
    if error is not None:
      raise error
    # A copy, as the device may still read this batch when the worker makes the one after next.
    batch = {name: np.array(array) for name, array in self._slots[worker][turn % SLOTS].items()}
    with self._explained(worker):
      connection.send(None)
    self._taken += 1
    return self._finish(batch)

  @contextlib.contextmanager
  def _explained(self, worker: int):
    """Turns the end of a worker's pipe into a sentence."""
    try:
      yield
    except (EOFError, ConnectionError) as error:
      process = self._workers[worker][0]
      process.join(10)
      self.close()
      raise FaultError(f"config.data.num_workers={len(self._workers)}: a worker process that makes "
                       f"batches {_ending(process.exitcode)}; checkpoints are kept, and the same "
                       "command goes on from there") from error

  def close(self) -> None:
    """Ends the workers."""
    self._end()


def _end_all(workers: list[tuple[Any, Connection]]) -> None:
  for process, connection in workers:
    connection.close()
    process.kill()                     # nothing is lost: a worker holds no lock and writes no file
  for process, _ in workers:
    process.join()


def _ending(exitcode: int | None) -> str:
  if exitcode is None or exitcode >= 0:
    return f"has ended (exit code {exitcode}); what it printed, above, may say why"
  name = signal.Signals(-exitcode).name
  return f"was ended by {name}" + (f", {_REASONS[name]}" if name in _REASONS else "")


def _places(example: Batch) -> tuple[dict[str, tuple], int]:
  """{name: (first byte, shape, type)} of each array of a batch in memory, and its size in bytes."""
  places, size = {}, 0
  for name, array in example.items():
    places[name] = (size, array.shape, array.dtype)
    size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
  return places, size


def _views(slot: np.ndarray, places: dict[str, tuple]) -> Batch:
  """The arrays of a batch that lie in a slot."""
  return {name: np.ndarray(shape, dtype, slot.data, first)
          for name, (first, shape, dtype) in places.items()}


@contextlib.contextmanager
def _deaf_to(number: int) -> Iterator[None]:
  """Lets a signal wait, here and in processes that are started within."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, memory, worker: int, num_workers: int,
          places: dict[str, tuple]) -> None:
  """A worker: says None when a slot is full, waits for an answer before it fills one again."""
  # Ctrl-C and the end of the machine are told to all: they are for the run, which then ends this.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
  slots = np.frombuffer(memory, np.uint8).reshape(num_workers, SLOTS, -1)[worker]
  slots = [_views(slot, places) for slot in slots]
  with contextlib.suppress(EOFError, ConnectionError):         # the run has ended, or was killed
    mine = _read(connection.recv_bytes(), worker, num_workers)
    for turn in itertools.count():
      try:
        batch = next(mine, None)
      except Exception as error:
        connection.send(_portable(error))
        return
      if batch is None:
        break
      if turn >= SLOTS:
        connection.recv()
      for name, array in slots[turn % SLOTS].items():
        array[...] = batch[name]
      connection.send(None)
    while True:                        # until the run has taken all and closes
      connection.recv()


def _read(everything: bytes, worker: int, num_workers: int) -> Iterator[Batch]:
  batches, first, num_threads = pickle.loads(everything)
  mine = batches[first + worker::num_workers]
  yield from mine.to_iter_dataset(grain.ReadOptions(num_threads, num_threads))


def _portable(error: Exception) -> Exception:
  """The error with where it came from; as a RuntimeError if it cannot be pickled."""
  error.add_note("In a worker process:\n" + traceback.format_exc())
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    return RuntimeError("".join(error.__notes__))
  return error
