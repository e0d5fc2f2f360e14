"""What a person sees of a run: metrics.jsonl, TensorBoard, a progress bar, tables, JSON files.

All of it is on a local disk, and written by one process of a run.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from advprop_jax.errors import InputError, of_disk

_SECONDS_BETWEEN_LINES = 10.0


class MetricsWriter:
  """Scalars and images by step: WORKDIR/metrics.jsonl and WORKDIR/tensorboard/.

  metrics.jsonl has one JSON object a line, {"step": 10, "train/loss": 2.3, ...}; a value that is
  not finite is null there, since JSON has no other word for it, and itself in TensorBoard. Write
  the metrics of a step before its checkpoint: what is missing then will be done again.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int = 0, writes: bool = True):
    """Opens the files, and takes out of them what will be done again.

    Args:
      workdir: made if it is not there.
      start_step: the step that the run resumes from, 0 for none. Of an earlier run the lines of
        steps > start_step are dropped, and a line that was half-written when the process was
        killed; TensorBoard is told to forget the same steps. From 0 all lines are put aside, in
        metrics.before.jsonl, metrics.before1.jsonl and so on.
      writes: False for all processes of a run but one: nothing is opened or written.

    Raises:
      InputError: the folder cannot be written; a FaultError where that may pass.
    """
    self._writes = writes
    if not writes:
      return
    workdir = pathlib.Path(workdir)
    first_step = start_step + 1 if start_step else 0   # from 0, step 0 is done again as well
    try:
      (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
      lines = workdir / "metrics.jsonl"
      if start_step:
        _drop_from(lines, first_step)
      elif lines.exists() and lines.stat().st_size:
        _put_aside(lines)
      self._lines = lines.open("a", encoding="utf-8")
      # Not SummaryWriter: its thread still holds events when its flush returns, and they are lost
      # if the process is killed. The time keeps a quick restart from writing over its last file.
      self._events = EventsWriter(str(workdir / "tensorboard" / "events"), f".{time.time_ns()}")
    except OSError as error:
      raise _not_written(workdir, error) from error
    self._add_event(first_step, session_log=SessionLog(status=SessionLog.START))

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers of one step, on disk when it returns.

    Args:
      step: the number of updates done.
      scalars: name -> anything that float() takes.

    Raises:
      FaultError: the disk is full.
    """
    if not self._writes:
      return
    values = {name: float(value) for name, value in scalars.items()}
    line = json.dumps({"step": int(step), **_jsonable(values)}, allow_nan=False)
    try:
      self._lines.write(line + "\n")
      self._lines.flush()
      os.fsync(self._lines.fileno())   # a mounted bucket keeps it to itself until then
      for name, value in values.items():
        self._add_event(step, summary=Summary(
            value=[Summary.Value(tag=name, simple_value=value)]))
      self._events.flush()
    except OSError as error:
      raise _not_written(self._lines.name, error) from error

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes one image, (height, width, 3) uint8, to TensorBoard only."""
    if not self._writes:
      return
    try:
      self._add_event(step, summary=summary.image(name, np.asarray(image), dataformats="HWC"))
      self._events.flush()
    except OSError as error:
      raise _not_written(self._lines.name, error) from error

  def _add_event(self, step: int, **content) -> None:
    self._events.write_event(Event(step=step, wall_time=time.time(), **content))

  def close(self) -> None:
    """Closes the files; nothing is left to write."""
    if not self._writes:
      return
    for file in (self._lines, self._events):
      with contextlib.suppress(OSError):   # of what could not be written it was said before
        file.close()


def _not_written(path: str | os.PathLike, error: OSError) -> InputError:
  return of_disk(error, f"{path} cannot be written", "choose another --workdir")


def _put_aside(path: pathlib.Path) -> None:
  """Gives a file the first name that is free: metrics.before.jsonl, metrics.before1.jsonl, ..."""
  names = (path.with_suffix(f".before{number or ''}{path.suffix}") for number in itertools.count())
  path.rename(next(name for name in names if not name.exists()))


def _drop_from(path: pathlib.Path, first_step: int) -> None:
  """Keeps the whole lines of steps < first_step, in one atomic exchange of the file."""
  if not path.exists():
    return
  text = path.read_text(encoding="utf-8", errors="replace")
  kept = "".join(line for line in text.splitlines(keepends=True) if _is_before(line, first_step))
  if kept != text:
    _replace(path, kept.encode())


def _is_before(line: str, step: int) -> bool:
  try:
    return line.endswith("\n") and json.loads(line)["step"] < step
  except (ValueError, KeyError, TypeError):
    return False


class Progress:
  """A bar on a terminal; elsewhere a plain line now and then, and always one for the last step."""

  def __init__(self, total_steps: int, start_step: int = 0, images_per_step: int = 1,
               stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
               name: str = "", shows: bool = True):
    """Shows the bar.

    Args:
      total_steps: the number of the last step.
      start_step: the step that the run resumes from.
      images_per_step: images of one update on all devices of all hosts.
      stream: where to, stderr by default.
      clock: seconds, rising.
      name: of what is done; not set: training, whose updates are steps.
      shows: False for all processes of a run but one: nothing is printed.
    """
    self._shows = shows
    self._named = f"{name}, batch" if name else "step"
    self._total, self._images, self._clock = total_steps, images_per_step, clock
    self._stream = stream or sys.stderr
    self._step = start_step
    self._first: tuple[int, float] | None = None   # the first update: its step and when it was done
    self._pauses = 0.0   # seconds of all pauses so far
    self._time = self._line_time = -math.inf   # of the last update, of the last line
    self._bar = None
    if shows and self._stream.isatty():
      self._bar = tqdm(total=total_steps, initial=start_step, file=self._stream, dynamic_ncols=True,
                       bar_format=(f"{name} " if name else "") +
                       "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def update(self, step: int, **values: float) -> None:
    """Shows that a step is done.

    Args:
      step: the number of updates done; need not be called for each.
      **values: what to show, e.g. loss=2.31.
    """
    now = self._clock()
    self._step, self._time = step, now - self._pauses
    if self._first is None:
      self._first = (step, self._time)   # the time before went into compiling
    text = ", ".join([*(f"{name} {value:.4g}" for name, value in values.items()), *self._speed()])
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
    elif now - self._line_time >= _SECONDS_BETWEEN_LINES or step >= self._total:
      self._line_time = now
      self.note(f"{self._named} {step}/{self._total}{': ' if text else ''}{text}")

  def _speed(self) -> list[str]:
    rate = self.images_per_second()
    if rate is None:
      return []
    seconds = round((self._total - self._step) * self._images / rate)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return [f"{_number(rate)} images/s", f"{hours}:{minutes:02}:{seconds % 60:02} left"]

  def images_per_second(self) -> float | None:
    """Images per second of all updates after the first (which compiles), pauses left out.

    None until two updates are done.
    """
    if self._first is None or self._step <= self._first[0]:
      return None
    step, start = self._first
    return (self._step - step) * self._images / max(self._time - start, 1e-9)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What is done within (an evaluation) does not count as training time."""
    start = self._clock()
    try:
      yield
    finally:
      self._pauses += self._clock() - start

  def note(self, text: str) -> None:
    """Prints a line of its own, without breaking the bar."""
    if not self._shows:
      return
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
  """Renders a plain-text table; columns of numbers are aligned right, a missing value is a dash.

  Args:
    rows: cells of text, numbers or None, as many in each row as in the header.
    header: the names of the columns.

  Returns:
    Lines without a newline at the end.
  """
  lines = [list(header), *([_cell(value) for value in row] for row in rows)]
  columns = list(zip(*lines, strict=True))
  right = [all(value is None or isinstance(value, int | float | np.number) for value in column)
           for column in zip(*rows, strict=True)] or [False] * len(columns)
  widths = [max(map(len, column)) for column in columns]
  lines.insert(1, ["-" * width for width in widths])
  return "\n".join(
      "  ".join(cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)).rstrip()
      for line in lines)


def _cell(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float | np.floating):
    return _number(float(value))
  return str(value)


def _number(value: float) -> str:
  """Four digits, and never an exponent for large ones."""
  return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"


def write_json(path: str | os.PathLike, data: Any) -> None:
  """Writes a JSON file in one piece: whoever reads sees the old file or the new one.

  Args:
    path: the file.
    data: what JSON knows, and NumPy or JAX numbers and arrays; numbers that are not finite become
      null.

  Raises:
    InputError: it cannot be written; a FaultError where that may pass.
  """
  write_text(path, json.dumps(_jsonable(data), indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
  """As `write_json`, of any text."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """As `write_json`, of any content."""
  path = pathlib.Path(path)
  try:
    _replace(path, content)
  except OSError as error:
    raise _not_written(path, error) from error


def read_json(path: str | os.PathLike) -> dict:
  """The object that a JSON file holds; an empty one where there is no file, or no whole object."""
  try:
    data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return data if isinstance(data, dict) else {}


def _replace(path: pathlib.Path, content: bytes) -> None:
  part = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with part.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())   # or a crash of the machine could leave an empty file of that name
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def _jsonable(data: Any) -> Any:
  if isinstance(data, Mapping):
    return {str(name): _jsonable(value) for name, value in data.items()}
  if isinstance(data, list | tuple):
    return [_jsonable(value) for value in data]
  if hasattr(data, "tolist"):   # NumPy and JAX
    return _jsonable(data.tolist())
  if isinstance(data, float) and not math.isfinite(data):
    return None
  return data
