"""Batches of uint8 images, the same for any number of processes, workers, threads, interruptions.

One infinite stream of records is cut into global batches, so no epoch has a tail to drop. Process p
of P takes the p-th of P equal blocks of each. What is random hangs on the seed and on the place in
the stream, never on who reads it; so a state is a number of batches, and nothing else.

A process of a pod may have worker processes of its own, which share its blocks (workers.py).
"""

import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from advprop_jax.data.decode import BrokenImage
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import EvaluationTransform, TrainingTransform
from advprop_jax.data.workers import Batch, Finish, WorkerBatches
from advprop_jax.errors import InputError


def _as_it_is(batch: Batch) -> Batch:
  return batch


class TrainingBatches(Iterator[Batch]):
  """An endless iterator whose state says what was taken, not what was read ahead."""

  def __init__(self, blocks: "_Blocks", num_workers: int, num_threads: int, finish: Finish):
    self._blocks, self._finish = blocks, finish
    self._num_workers, self._num_threads = num_workers, num_threads
    self._taken, self._iterator = 0, None

  def __next__(self) -> Batch:
    if self._iterator is None:         # not before, as a run that resumes begins elsewhere
      self._iterator = _iterate(self._blocks, self._taken, self._num_workers, self._num_threads,
                                self._finish)
    batch = next(self._iterator)
    self._taken += 1
    return batch

  def example(self) -> Batch:
    """A batch of the shapes and types that all have; none is taken."""
    return self._finish(self._blocks.example())

  def get_state(self) -> dict[str, int]:
    """{"batches": how many were taken}: JSON, and good for any number of processes and workers."""
    return {"batches": self._taken}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to where `get_state` was called: the next batch is the one that followed."""
    self.close()
    self._taken = int(state["batches"])

  def close(self) -> None:
    """Ends the workers and threads that read ahead; the next batch starts others."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
  """Batches of one pass, in order; `len` of them, the same on every process."""

  blocks: "_Blocks"
  num_workers: int
  num_threads: int
  finish: Finish

  def __len__(self) -> int:
    return len(self.blocks)

  def __iter__(self) -> Iterator[Batch]:
    return self.starting_at(0)

  def example(self) -> Batch:
    """A batch of the shapes and types that all have."""
    return self.finish(self.blocks.example())

  def starting_at(self, first: int) -> Iterator[Batch]:
    """The batches from number `first` on; none where all are before it."""
    left = len(self) - first
    if left <= 0:
      return
    iterator = _iterate(self.blocks, first, min(self.num_workers, left), self.num_threads,
                        self.finish)
    try:
      yield from iterator
    finally:
      iterator.close()


def training_batches(source: Source, *, batch_size: int, transform: TrainingTransform, seed: int,
                     process_index: int = 0, process_count: int = 1, num_workers: int = 0,
                     num_threads: int = 1,
                     more_views: Mapping[str, TrainingTransform] | None = None,
                     skip_broken: bool = False, finish: Finish = _as_it_is) -> TrainingBatches:
  """Shuffled, augmented batches without end; every epoch has its own order.

  Args:
    source: the records.
    batch_size: images per step of all processes together; n = batch_size // process_count.
    transform: (uint8 (h, w, 3), generator) -> uint8 (size, size, 3). The generator is seeded by
      the place of the image in the stream.
    seed: of order and augmentation, 0 or more.
    process_index: which block of each global batch.
    process_count: how many blocks.
    num_workers: processes that make batches; 0: this one does. With some, source and transforms
      have to be picklable, and a script has to begin by `if __name__ == "__main__"`.
    num_threads: that read ahead, of this process or of each worker; 0 reads when asked.
    more_views: other transforms of the same images, by the name of their entry in a batch. They
      draw after `transform`, whose result they do not change.
    skip_broken: an image that does not decode gives way to the record after it, with a warning;
      else it is an error that names it.
    finish: what is done with a batch in this process, such as to send it to the devices: by the
      threads that read ahead, where there are some and no workers. What is left to do for the
      thread that trains waits there for them, who hold Python's lock as they make another batch.

  Returns:
    Iterator of what `finish` makes of {"image": uint8 (n, size, size, 3), "label": int32 (n,)}, and
    an entry like "image" for each other view.

  Raises:
    InputError: batch_size is no multiple of process_count; from the iterator, a broken image.
  """
  # Seeds of their own, as Grain would derive them from the depth of the pipeline, and shuffle
  # epoch e of seed s like epoch 0 of seed s + e.
  order_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
  views = {"image": transform, **(more_views or {})}
  stream = (grain.MapDataset.range(len(source))
            .shuffle(seed=order_seed)
            .random_map(_Read(source, views, skip_broken), seed=augment_seed)
            .repeat())
  blocks = _Blocks(stream, batch_size, process_index, process_count, masked=False)
  return TrainingBatches(blocks, num_workers, num_threads, finish)


def evaluation_batches(source: Source, *, batch_size: int, transform: EvaluationTransform,
                       process_index: int = 0, process_count: int = 1, limit: int | None = None,
                       num_workers: int = 0, num_threads: int = 1,
                       finish: Finish = _as_it_is) -> EvaluationBatches:
  """Every image once over all processes, in order; what is missing in the last batch is padded.

  Args:
    source: the records.
    batch_size: images per step of all processes together; n = batch_size // process_count.
    transform: uint8 (h, w, 3) -> uint8 (size, size, 3).
    process_index: which block of each global batch.
    process_count: how many blocks.
    limit: only the first so many records.
    num_workers: processes that make batches; 0: this one does. With some, source and transforms
      have to be picklable, and a script has to begin by `if __name__ == "__main__"`.
    num_threads: that read ahead, of this process or of each worker; 0 reads when asked.
    finish: as of `training_batches`.

  Returns:
    Sized iterable of what `finish` makes of {"image": uint8 (n, size, size, 3), "label": int32
    (n,), "mask": bool (n,), False for padding, "index": int32 (n,), the record's index}. Padding is
    black, of label 0, and its indices go on counting.

  Raises:
    InputError: batch_size is no multiple of process_count.
  """
  records = len(source) if limit is None else min(limit, len(source))
  stream = grain.MapDataset.range(records).map(_Read(source, {"image": transform}))
  blocks = _Blocks(stream, batch_size, process_index, process_count, masked=True)
  return EvaluationBatches(blocks, num_workers, num_threads, finish)


@dataclasses.dataclass(frozen=True)
class _Read:
  """Record index -> its label and views of its image; a class, as worker processes pickle it.

  The pipeline is one of indices up to here: `grain.MapDataset.source` would spend a third of the
  time for a small image on its own statistics.
  """

  source: Source
  views: Mapping[str, TrainingTransform | EvaluationTransform]
  skip_broken: bool = False

  def __call__(self, index: int, *rng: np.random.Generator) -> dict[str, Any]:
    for place in range(index, index + len(self.source)):
      try:
        record = self.source[place % len(self.source)]
        views = {name: transform(record["image"], *rng) for name, transform in self.views.items()}
        return {**views, "label": record["label"]}
      except BrokenImage as error:
        if not self.skip_broken:
          raise
        broken = error
        if str(error) not in _LEFT_OUT:
          _LEFT_OUT.add(str(error))
          logging.warning("%s. It is left out, and the image after it takes its place (number %d "
                          "in this process)", error, len(_LEFT_OUT))
    raise broken


_LEFT_OUT: set[str] = set()   # broken images that this process has been warned of


class _Blocks(grain.MapDataset):
  """Element `step` is this process's block of the global batch `step`.

  Grain shards by striding over the records, which gives another global batch for each number of
  processes.
  """

  def __init__(self, stream: grain.MapDataset, batch_size: int, process_index: int,
               process_count: int, masked: bool):
    super().__init__(stream)
    if batch_size < 1 or batch_size % process_count:
      near = max(batch_size // process_count, 1) * process_count
      raise InputError(f"data.batch_size={batch_size} cannot be shared by {process_count} "
                       f"processes: use a multiple of {process_count}, such as {near}")
    self._batch_size = batch_size
    self._block = batch_size // process_count
    self._offset = process_index * self._block
    self._masked = masked

  def __len__(self) -> int:
    stream = len(self._parent)
    return stream if stream == sys.maxsize else -(-stream // self._batch_size)

  def __getitem__(self, step: int) -> Batch:
    if isinstance(step, slice):
      return self.slice(step)
    places = np.arange(self._block) + (step * self._batch_size + self._offset)
    mask = places < len(self._parent)
    records = [self._parent[place] for place in places[mask].tolist()]
    # A block of padding only has to know the shapes as well.
    batch = self._black(records[0] if records else self._parent[0])
    for row, record in enumerate(records):
      for name, value in record.items():
        batch[name][row] = value
    return {**batch, "mask": mask, "index": places.astype(np.int32)} if self._masked else batch

  def example(self) -> Batch:
    """A batch of the shapes and types that all have, for the cost of one record."""
    batch, numbers = self._black(self._parent[0]), np.zeros(self._block, np.int32)
    return {**batch, "mask": numbers > 0, "index": numbers} if self._masked else batch

  def _black(self, record: dict[str, Any]) -> Batch:
    images = {name: np.zeros((self._block, *value.shape), np.uint8)
              for name, value in record.items() if name != "label"}
    return {**images, "label": np.zeros(self._block, np.int32)}


def _iterate(blocks: _Blocks, first: int, num_workers: int, num_threads: int,
             finish: Finish) -> Iterator[Batch]:
  if num_workers:
    return WorkerBatches(blocks, first, blocks.example(), num_workers, num_threads, finish)
  # The unit is a batch here: a few read ahead hide the time it takes, 500 would fill the memory.
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
  return iter(blocks[first:].map(finish).to_iter_dataset(options))
