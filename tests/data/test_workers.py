"""Worker processes: the same stream, whatever their number; and how they end."""

import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from advprop_jax.data import loader
from advprop_jax.data.decode import Encoded
from advprop_jax.data.loader import evaluation_batches, training_batches
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import evaluation_transform, training_transform
from advprop_jax.data.workers import WorkerBatches
from advprop_jax.errors import InputError
from advprop_jax.runtime.config import default_config, validate
from tests import photographs
from tests.conftest import ROOT

SIZE = 6


def numbered(length: int) -> Source:
  """Records whose label is their index, with random pixels."""
  images = np.random.default_rng(0).integers(0, 256, (length, SIZE, SIZE, 3)).astype(np.uint8)
  return of([{"image": image, "label": label} for label, image in enumerate(images)])


def of(records) -> Source:
  return Source("numbered", "train", tuple(map(str, range(len(records)))), records)


def training(source=None, num_workers=0, **settings):
  return training_batches(
      source or numbered(20), batch_size=8, seed=0, num_workers=num_workers,
      transform=training_transform(SIZE, "crop_flip", padding=2),
      more_views={"second": training_transform(SIZE, "autoaugment", padding=2)}, **settings)


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
      assert a[name].dtype == b[name].dtype


class Unportable(Exception):
  """An error whose pickle cannot be read."""

  def __init__(self, one, two):
    super().__init__(f"{one} and {two}")


ERRORS = {"input": lambda: InputError("record 3 does not decode"),
          "end": lambda: EOFError("no more bytes"),
          "unportable": lambda: Unportable("this", "that")}


@dataclasses.dataclass
class Failing:
  """Twenty records of which the fourth raises an error."""

  error: str

  def __len__(self):
    return 20

  def __getitem__(self, index):
    if index == 3:
      raise ERRORS[self.error]()
    return numbered(20).records[index]


class Devices:
  """Twenty records whose label says whether JAX has devices where they are read."""

  def __len__(self):
    return 20

  def __getitem__(self, index):
    from jax._src import xla_bridge
    return {**numbered(20).records[index], "label": int(xla_bridge.backends_are_initialized())}


def test_a_run_may_go_on_with_any_number_of_workers():
  """Fails where a batch hangs on who makes it, or the state on what was read ahead.

  So does it where a batch is still the worker's memory: the next ones would be written over it.
  """
  everything = training()
  expected = [next(everything) for _ in range(17)]
  taken, state = [], {"batches": 0}
  for workers, number in ((1, 3), (2, 5), (0, 2), (4, 7)):    # an epoch is 2 1/2 batches
    batches = training(num_workers=workers, num_threads=workers % 3)
    batches.set_state(state)
    taken += [next(batches) for _ in range(number)]
    state = batches.get_state()
    batches.close()
  assert_same(taken, expected)
  assert state == {"batches": 17}
  assert not multiprocessing.active_children()


def test_evaluation_by_workers_is_the_same_and_can_be_run_again():
  """Fails where a ragged end is lost, or a second pass begins where the first one ended."""
  def batches(num_workers):
    return evaluation_batches(numbered(17), batch_size=4, transform=evaluation_transform(SIZE),
                              num_workers=num_workers)

  expected, two = list(batches(0)), batches(2)
  assert len(expected) == 5
  for _ in range(2):
    assert_same(list(two), expected)
  assert not multiprocessing.active_children()


def test_no_more_workers_than_batches(monkeypatch):
  """Fails where a small test set starts processes that have nothing to do."""
  started = []

  def start(blocks, first, example, num_workers, *settings):
    started.append(num_workers)
    return WorkerBatches(blocks, first, example, num_workers, *settings)

  monkeypatch.setattr(loader, "WorkerBatches", start)
  batches = evaluation_batches(numbered(3), batch_size=4, num_workers=5,
                               transform=evaluation_transform(SIZE))
  assert [batch["mask"].sum() for batch in batches] == [3]
  assert started == [1]


def test_workers_leave_the_devices_alone():
  """Fails where a worker initialises JAX: it would take the accelerator, or its memory."""
  batches = training(of(Devices()), num_workers=1)
  assert not next(batches)["label"].any()
  batches.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_stops_the_run(number):
  """Fails where the run hangs, or does not say what has happened."""
  batches = training(num_workers=2)
  next(batches)
  os.kill(multiprocessing.active_children()[0].pid, number)
  start = time.monotonic()
  with pytest.raises(InputError, match=rf"num_workers=2: a worker .* ended by {number.name}, as"):
    list(itertools.islice(batches, 10))
  assert time.monotonic() - start < 5
  assert not multiprocessing.active_children()         # the others have ended too
  batches.close()


def test_workers_outlive_the_signal_that_the_machine_ends():
  """Fails where SIGTERM, which a shutdown sends to all, ends them before the run has saved."""
  batches = training(num_workers=2)
  next(batches)
  for process in multiprocessing.active_children():
    os.kill(process.pid, signal.SIGTERM)
  assert len(list(itertools.islice(batches, 10))) == 10
  batches.close()
  assert not multiprocessing.active_children()


@pytest.mark.parametrize(("error", "kind", "says"), [
    ("input", InputError, "record 3 does not decode"), ("end", EOFError, "no more bytes"),
    ("unportable", RuntimeError, "Unportable: this and that"),
])
def test_an_error_in_a_worker_is_the_run_s(error, kind, says):
  """Fails where another sentence takes its place, or where the stream waits for what never comes.

  An error that cannot travel, or that could be the end of a pipe, must arrive as well.
  """
  batches = training(of(Failing(error)), num_workers=1)
  with pytest.raises(kind) as caught:
    list(itertools.islice(batches, 3))
  batches.close()
  if kind is RuntimeError:
    assert says in str(caught.value)
  else:
    assert str(caught.value) == says
    assert "test_workers.py" in "".join(caught.value.__notes__)       # where it came from


PROGRAM = """
import multiprocessing, sys, time
from tests.data.test_workers import training
if __name__ == "__main__":
  batches = training(num_workers=1)
  next(batches)
  print(*(child.pid for child in multiprocessing.active_children()), flush=True)
  time.sleep(60)
"""


def alive(pid: int) -> bool:
  """Whether a process runs; what has ended and waits to be asked for its exit code does not."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="asks /proc")
def test_no_worker_outlives_a_run_that_is_killed(tmp_path):
  """Fails where workers wait for ever, with their memory, for one who will not come."""
  (tmp_path / "program.py").write_text(PROGRAM)
  run = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE,
                         text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
  worker = int(run.stdout.readline())
  assert alive(worker)
  run.kill()
  run.wait()
  run.stdout.close()
  deadline = time.monotonic() + 10
  while alive(worker):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_less_than_no_workers():
  config = default_config()
  config.data.num_workers, config.data.image_size = -1, 28
  with pytest.raises(InputError, match=r"config\.data\.num_workers=-1.*at least 0"):
    validate(config, 1)


def resident(pid: int) -> float:
  """Resident memory in MB."""
  for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
    if line.startswith("VmRSS:"):
      return int(line.split()[1]) / 1024
  raise AssertionError("no VmRSS")


def encoded_photographs():
  """A thousand records of twenty JPEGs of 500 x 375 pixels."""
  files = photographs.jpegs(None)
  records = [{"image": Encoded(files[i % len(files)]), "label": 0} for i in range(1000)]
  return Source("photographs", "train", ("a",), records)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kind"), [(0, "arrays"), (2, "arrays"), (0, "JPEGs"),
                                               (2, "JPEGs")])
def test_memory_does_not_grow(workers, kind, capsys):
  """10^4 batches: fails where one is kept, by this process or by a worker (a batch is 96 kB, or
  600 kB of photographs, decoded, cropped and augmented)."""
  settings = {"source": numbered(1000), "batch_size": 16,
              "transform": training_transform(32, "none")}
  if kind == "JPEGs":
    settings = {"source": encoded_photographs(), "batch_size": 4,
                "transform": training_transform(224, "autoaugment", crop="random_resized")}
  batches = training_batches(**settings, seed=0, num_workers=workers, num_threads=2)
  sizes = []
  for taken in range(1, 10_001):
    next(batches)
    if taken in (1_000, 10_000):
      pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
      sizes.append([resident(pid) for pid in pids])
  batches.close()
  with capsys.disabled():
    print(f"\n{kind}, {workers} workers: MB after 1,000 and 10,000 batches: "
          f"{np.round(sizes, 1).tolist()}")
  assert np.max(np.subtract(sizes[1], sizes[0])) < 10

