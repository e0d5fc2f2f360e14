"""The folder of a run, and whether a config is that of the run in it."""

import os
import pathlib
import time

import ml_collections

from advprop_jax.errors import InputError, of_disk
from advprop_jax.runtime import agreement
from advprop_jax.runtime.config import differences
from advprop_jax.runtime.metrics import read_json

LATER = ("eval", "export", "report", "checkpoint")  # sections that may change later
# Fields besides these that may be others where a run is only evaluated: which images, not how.
EVALUATED = ("data.name", "data.dir", "data.train_split", "data.test_split", "data.broken",
             "data.crop_fraction")
# Fields that may be others where a training goes on: what the machines and their disks ask for.
# With other devices the numbers stay where bn_group_size x images per device does.
RESTARTED = ("checkpoint", "train.max_skips", "train.accumulation", "model.remat",
             "model.bn_group_size", "eval.batch_size", "eval.num_workers")
SEEN_SECONDS = 10.0                     # in which a shared disk shows a new file everywhere
SPEED = ("data.num_workers", "data.num_threads")    # fields that change nothing but the speed


def make_workdir(workdir: str) -> None:
  """Makes the folder of a run, unless it is there; an InputError if that cannot be, or be written.

  A FaultError where that may pass.
  """
  if "://" in workdir:
    raise InputError(f"--workdir={workdir}: is no folder of this machine; mount the bucket, with "
                     "gcsfuse for instance, and give the folder that it is mounted on")
  probe = pathlib.Path(workdir, f".writable.{agreement.process()[0]}.{os.getpid()}")
  try:
    os.makedirs(workdir, exist_ok=True)
    probe.touch()                  # a mounted bucket without permission says so only then
    probe.unlink()
  except OSError as error:
    raise of_disk(error, f"--workdir={workdir}: cannot be used",
                  "give a folder that can be written") from error


def require_shared(workdir: str) -> None:
  """Raises an InputError, on every process, unless all of a pod see the same folder.

  Args:
    workdir: is there, and can be written.
  """
  if agreement.alone():
    return
  token = agreement.from_first(time.time_ns())
  mark = pathlib.Path(workdir, f".seen_by_all.{token}")
  failure = None
  if agreement.is_first():
    try:
      mark.touch()
    except OSError as error:
      failure = [error.errno, error.strerror]
  failure = agreement.from_first(failure)
  if failure:
    raise of_disk(OSError(*failure), f"--workdir={workdir}: process 0 cannot write there",
                  "give a folder that can be written")
  deadline = time.monotonic() + SEEN_SECONDS
  while not mark.exists() and time.monotonic() < deadline:
    time.sleep(0.2)
  unseen = agreement.first_of(None if mark.exists() else str(agreement.process()[0]))
  if agreement.is_first():
    mark.unlink(missing_ok=True)
  if unseen:
    raise InputError(f"--workdir={workdir}: process {unseen} does not see what process 0 writes "
                     "there; give a folder that all processes share, such as a mounted bucket or "
                     "a network disk")


def read_config(workdir: str) -> dict:
  """The config that a workdir's run was started with.

  Raises:
    InputError: its config.json is not whole.
  """
  saved = read_json(os.path.join(workdir, "config.json"))
  if not saved:
    raise InputError(f"--workdir={workdir}: its config.json is not whole; delete that file, and "
                     "what the checkpoints say will be taken")
  return saved


def refuse_other_run(config: ml_collections.ConfigDict, workdir: str,
                     ignored: tuple[str, ...] = ()) -> None:
  """As `refuse_other_config`, of the workdir's config.json, if there is one."""
  if os.path.exists(os.path.join(workdir, "config.json")):
    refuse_other_config(config, read_config(workdir), workdir, ignored)


def refuse_other_config(config: ml_collections.ConfigDict, saved: dict, workdir: str,
                        ignored: tuple[str, ...] = ()) -> None:
  """Raises an InputError if a workdir holds a run of another config, and says what differs.

  SPEED fields may always differ.
  """
  differing = differences(config.to_dict(), saved, (*ignored, *SPEED))
  if differing:
    more = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
    raise InputError(
        f"--workdir={workdir}: holds a run of another config; take another workdir, or set back "
        f"{', '.join(differing[:10])}{more} (saved -> given)")
