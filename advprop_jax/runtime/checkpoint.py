"""Checkpoints by Orbax: whole or not there, written beside the training.

WORKDIR/checkpoints/<step> holds four items: `state` (a pytree of arrays), `iterator`, `config` and
`metrics_of_step` (JSON), and a list of their files with checksums (integrity.py). All of it is
written in a temporary folder, which gets its name, <step>, when it is complete.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from advprop_jax.errors import FaultError, InputError, brief, of_disk
from advprop_jax.runtime import agreement
from advprop_jax.runtime.integrity import DamagedError, check_tree, verify, write_manifest
from advprop_jax.runtime.parallel import placed, replicated
from advprop_jax.runtime.quiet import quiet_orbax

SAVING_SECONDS = 300   # for one process of a pod to wait for another, whose disk may be full
_METRICS = "metrics_of_step"   # "metrics" is a name that Orbax keeps for itself


@dataclasses.dataclass(frozen=True)
class Restored:
  """What one checkpoint held.

  Attributes:
    step, iterator, config: as given to `save`.
    state: the arrays, in the containers of the abstract state that was asked for.
    metrics: as given to `save`, {} if none were.
  """

  step: int
  state: Any
  iterator: dict[str, Any]
  config: dict[str, Any]
  metrics: dict[str, float]


class Checkpoints:
  """The checkpoints of one run: the newest `keep` and the best one.

  Every process of a run makes one and calls the same methods in the same order. Use it as a context
  manager, or call `close`: a save is finished only then.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 1,
               best_metric: str | None = None, write: bool = True):
    """Opens a directory of checkpoints.

    Args:
      directory: made if it is not there and `write` is set.
      keep: how many of the newest checkpoints stay, at least 1.
      best_metric: the name, in the metrics given to `save`, of the one by which the best checkpoint
        is kept as well, higher is better. A checkpoint saved without it is never the best, and
        stays as long as it is among the newest.
      write: False only reads, for evaluation: nothing is made, moved or cleaned up, so that it may
        be used while a training writes to the same directory.

    Raises:
      InputError: the directory cannot be made or written; a FaultError where that may pass.
    """
    if keep < 1:
      raise InputError(f"checkpoint.keep is {keep}; at least 1 checkpoint must be kept.")
    quiet_orbax()
    self._directory = epath.Path(directory).absolute()
    self._keep, self._best_metric, self._write = keep, best_metric, write
    self._saving: int | None = None
    self._metrics: dict[int, dict[str, float]] = {}
    self._manager: ocp.CheckpointManager | None = None
    if write or self._directory.exists():
      self._open()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if error is not None and not agreement.alone():
      # The others may not be where they would have to be for `close`, or be gone. A save under way
      # needs nothing of them but their threads.
      if isinstance(error, InputError) and self._manager is not None:
        with contextlib.suppress(Exception):
          self._manager.wait_until_finished()
      return
    try:
      self.close()
    except InputError:
      if error is None:   # or it would hide what went wrong first
        raise

  def _open(self) -> None:
    options = ocp.CheckpointManagerOptions(
        create=self._write, cleanup_tmp_directories=self._write,   # what a killed process left
        preservation_policy=_NewestAndBest(self._keep, self._score),
        async_options=ocp.AsyncOptions(timeout_secs=SAVING_SECONDS,
                                       post_finalization_callback=self._write_manifest),
        lightweight_initialize=True, save_root_metadata=False)   # nothing of it is needed
    try:
      self._manager = ocp.CheckpointManager(self._directory, options=options)
      # It would ask JAX with numbers of its own, and JAX would tell the training no more.
      self._manager.reached_preemption = lambda step: False
      if self._write:
        self._probe()
    except OSError as error:
      raise of_disk(error, f"The checkpoint directory {self._directory} cannot be written",
                    "choose another --workdir") from error
    # Opened again after a save that failed, it knows them all: to read them needs every process,
    # and one that has found the disk full above does not come here.
    self._metrics = {step: self._metrics[step] if step in self._metrics
                     else self._read_metrics(step) for step in self._steps()}

  def _probe(self) -> None:
    """Raises an OSError where this process can write nothing."""
    probe = self._directory / f".writable.{jax.process_index()}"
    try:
      probe.write_bytes(bytes(2**16))    # a full disk still takes empty files
    finally:
      probe.unlink(missing_ok=True)

  def save(self, step: int, state: Any, iterator: dict[str, Any], config: dict[str, Any],
           metrics: dict[str, float] | None = None) -> bool:
    """Starts to save, and returns as soon as the state may be donated.

    The arrays have been copied in the host's memory by then. The save before this one is waited
    for.

    Args:
      step: the number of updates that made this state.
      state: any pytree of jax or NumPy arrays.
      iterator: a JSON object, the same on every process.
      config: a JSON object.
      metrics: of this very state; needed only for `best_metric`.

    Returns:
      False if there is a checkpoint of this step already; it stays as it is.

    Raises:
      FaultError: this save could not be started, or the one before it not finished (disk full);
        the checkpoints before them are whole, and `save` may be tried again.
      TypeError: iterator or config is no JSON.
    """
    if step in self.steps():
      return False
    json.dumps([iterator, config])   # raises here what Orbax's thread would raise, less clearly
    self._saving = step
    self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items()}

    def start():
      self._manager.save(step, force=True, args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(_to_orbax(state)),
          iterator=ocp.args.JsonSave(iterator),
          config=ocp.args.JsonSave(config),
          **{_METRICS: ocp.args.JsonSave(self._metrics[step])}))

    # First of all: in a save that fails at once on one process, the others would wait for it long.
    for begin in (self._probe, start):
      failure = None
      try:
        begin()
      except (OSError, RuntimeError) as error:   # JAX's own are the latter
        failure = error
      self._raise_if_failed(failure)
    return True

  def wait(self) -> None:
    """Waits until the save under way, if any, is whole on disk; raises FaultError if it failed.

    In a pod it raises on every process if it failed on one.
    """
    if self._saving is None:
      return
    failure = None
    try:
      if self._manager is not None:
        self._manager.wait_until_finished()
    except Exception as error:   # from threads that only write: of whatever type, it is that
      failure = error
    self._raise_if_failed(failure)
    self._saving = None

  def close(self) -> None:
    """Waits as `wait` does, and lets go of Orbax's threads; no further call is allowed."""
    try:
      self.wait()
    finally:
      if self._manager is not None:
        self._manager.close()
        self._manager = None

  def _raise_if_failed(self, failure: Exception | None) -> None:
    reasons = agreement.said_by_any(None if failure is None else brief(_origin(failure)))
    if not reasons:
      return
    # Who waited in vain for a process whose disk is full knows less than that one.
    reason = min(reasons, key=lambda reason: "imed out" in reason)
    if "imed out" in reason:
      reason = (f"a process did not write its part within {SAVING_SECONDS} s, as where its disk is "
                "full")
    step, self._saving = self._saving, None
    with contextlib.suppress(InputError):   # nothing can be written now, as the user will be told
      self._open()   # forgets the failed save, and frees what it has taken of the disk
    raise FaultError(f"The checkpoint of step {step} could not be written to {self._directory} "
                     f"({reason}); free some space or choose another --workdir (whole checkpoints "
                     f"there: {self._listed()}).") from failure

  def _write_manifest(self) -> None:
    # Orbax calls it on process 0 when the items are written and before the folder gets its name, so
    # that no checkpoint is without it. In a bucket, the folder has its name from the start.
    step = str(self._saving)
    temporary = self._directory.glob(f"{step}.orbax-checkpoint-tmp*")
    write_manifest(next(temporary, self._directory / step))

  def steps(self) -> list[int]:
    """The steps of all checkpoints, rising; a save under way is waited for."""
    self.wait()
    return self._steps()

  def _steps(self) -> list[int]:
    return [] if self._manager is None else sorted(self._manager.all_steps())

  def _listed(self) -> str:
    return ", ".join(map(str, self._steps())) or "none"

  def best_step(self) -> int | None:
    """The step with the highest `best_metric`, None if no checkpoint has it."""
    return next(iter(_ranked(self.steps(), self._score)), None)

  def restore_latest(self, abstract_state: Any, partial: bool = False) -> Restored | None:
    """Restores the newest checkpoint that is whole.

    A damaged one on the way is reported in one sentence as a warning and, if we write, renamed to
    `<step>.damaged`, so that the training can save at its step again.

    Args:
      abstract_state: a pytree of anything with shape and dtype (`jax.eval_shape` gives one); the
        arrays come back `replicated()`.
      partial: allows a dict of a part of the state, e.g. {"params": ..., "batch_stats": ...}; the
        rest is not read.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      InputError: none of the checkpoints is whole, or the newest is of another network; or the disk
        does not let it be read, and it stays where it is (a FaultError where that may pass).
    """
    return self._restore_first(self.steps()[::-1], abstract_state, partial)

  def restore_best(self, abstract_state: Any, partial: bool = False) -> Restored | None:
    """As `restore_latest`, by falling `best_metric`; those without it last, newest first."""
    steps = self.steps()[::-1]
    ranked = _ranked(steps, self._score)
    others = [step for step in steps if step not in ranked]
    return self._restore_first(ranked + others, abstract_state, partial)

  def restore_first(self, which: str, abstract_state: Any, partial: bool = False
                    ) -> Restored | None:
    """`restore_best` where `which` is "best", else `restore_latest`, for "newest"."""
    restore = self.restore_best if which == "best" else self.restore_latest
    return restore(abstract_state, partial)

  def doubt(self, step: int) -> None:
    """Renames the checkpoint of a step to `<step>.doubted`; not the only one that there is."""
    steps = agreement.from_first(self.steps())
    if step in steps and len(steps) > 1:
      self._move_aside(step, "doubted")

  def restore(self, step: int, abstract_state: Any, partial: bool = False) -> Restored:
    """Restores one checkpoint.

    Raises:
      InputError: it is not there, damaged, or of another network.
    """
    if step not in self.steps():
      raise InputError(f"There is no checkpoint of step {step} in {self._directory} (those there: "
                       f"{self._listed()}).")
    try:
      return self._restore_one(step, abstract_state, partial)
    except DamagedError as error:
      raise InputError(f"The checkpoint {self._directory / str(step)} is damaged ({error}); choose "
                       "another step, or bring back a copy of it.") from error

  def _restore_first(self, steps: Sequence[int], abstract_state: Any,
                     partial: bool) -> Restored | None:
    damaged = {}
    for step in agreement.from_first(list(steps)):
      try:
        restored = self._restore_one(step, abstract_state, partial)
      except DamagedError as error:
        damaged[step] = str(error)
        continue
      for bad, reason in damaged.items():
        aside = self._move_aside(bad) if self._write else ""
        if not agreement.is_first():
          continue
        logging.warning("The checkpoint %s is damaged (%s)%s; falling back to step %d.",
                        self._directory / str(bad), reason, aside, step)
      return restored
    if damaged:
      reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
      raise InputError(f"None of the checkpoints in {self._directory} can be read ({reasons}); "
                       "bring back a copy of one, or start again in an empty --workdir.")
    return None

  def _restore_one(self, step: int, abstract_state: Any, partial: bool) -> Restored:
    directory = self._directory / str(step)
    # One process looks and tells the others, or they might part ways here.
    damage = unread = None
    if agreement.is_first():
      try:
        verify(directory)
      except DamagedError as error:
        damage = str(error)
      except OSError as error:
        unread = [error.errno, brief(error)]
    damage, unread = agreement.from_first([damage, unread])
    if damage is not None:
      raise DamagedError(damage)
    if unread is not None:
      raise of_disk(OSError(*unread), f"The checkpoint {directory} cannot be read",
                    "move it away to go on without it")
    place = replicated(jax.devices())
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract_state)
    check_tree(directory, target, partial)
    items = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target),
                                     partial_restore=partial),
        **{name: ocp.args.JsonRestore() for name in ("iterator", "config", _METRICS)}))
    return Restored(step, _from_orbax(items["state"]), items["iterator"], items["config"],
                    items[_METRICS])

  def _move_aside(self, step: int, word: str = "damaged") -> str:
    names = (f"{step}.{word}{number or ''}" for number in itertools.count())
    name = next(name for name in names if not (self._directory / name).exists())
    if agreement.is_first():
      (self._directory / str(step)).rename(self._directory / name)
    agreement.meet("moved")
    self._manager.reload()
    return f", moved to {name}"

  def _read_metrics(self, step: int) -> dict[str, float]:
    try:
      items = ocp.args.Composite(**{_METRICS: ocp.args.JsonRestore()})
      return dict(self._manager.restore(step, args=items)[_METRICS])
    except Exception:   # damaged: not the best then, and `restore` will say so
      return {}

  def _score(self, step: int) -> float | None:
    value = self._metrics.get(step, {}).get(self._best_metric)
    return value if value is not None and math.isfinite(value) else None


def _origin(failure: Exception) -> BaseException:
  """The system's error that it came of, if any: in a pod Orbax fails again where it cleans up."""
  error = failure
  while error is not None and getattr(error, "errno", None) is None:
    error = error.__cause__ or error.__context__
  return error or failure


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest `keep` checkpoints and the best one."""

  def __init__(self, keep: int, score: Callable[[int], float | None]):
    self._keep, self._score = keep, score

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    stay = {*steps[-self._keep:], *_ranked(steps, self._score)[:1]}
    return [checkpoint.step in stay for checkpoint in checkpoints]


def _to_orbax(state: Any) -> Any:
  """The state of a training, as Orbax is to write it.

  In a pod its arrays on the devices of all processes. Of one process NumPy arrays: for each of
  JAX's Orbax writes its sharding, too, and looks for its replicas, and all takes more than twice as
  long. Orbax copies them before `save` returns, so that the memory of JAX's is free for the next
  step; an accelerator's are then in the host's memory twice.
  """
  if jax.process_count() == 1:
    return jax.device_get(state)
  return placed(state, replicated(jax.devices()))


def _from_orbax(state: Any) -> Any:
  """What Orbax has read onto the devices of all processes, as `pmap` has it."""
  return state if jax.process_count() == 1 else placed(state, replicated())


def _ranked(steps: Sequence[int], score: Callable[[int], float | None]) -> list[int]:
  """The steps that have a score, the best first, of equals the newest."""
  scored = [step for step in steps if score(step) is not None]
  return sorted(scored, key=lambda step: (score(step), step), reverse=True)
