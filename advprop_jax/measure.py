"""Runs the passes of benchmarks: compiled once per kind, counted image by image, kept and resumed.

What the network says of each image is brought to the host, a few bytes an image; sums, means and
standard errors are made there, in float64. So the same compiled step serves any number of sets.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
import pickle
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from advprop_jax.benchmarks.contract import Pass, Row
from advprop_jax.data import loader
from advprop_jax.data.workers import Batch
from advprop_jax.errors import InputError, LocalError
from advprop_jax.method.measure import NEVER, Attacker, measure_step, shown_step
from advprop_jax.models.batch_norm import of_domain
from advprop_jax.models.network import Network
from advprop_jax.runtime import agreement, parallel
from advprop_jax.runtime.compilation import Program
from advprop_jax.runtime.metrics import Progress, write_bytes
from advprop_jax.runtime.workdir import make_workdir

SAMPLES = 16                           # images that are looked at before answers are taken over
BINS = 15                              # of confidence, for the calibration error
SECONDS_BETWEEN_SAVES = 60.0
_QUIET_SECONDS = 10.0                  # before progress is shown


@dataclasses.dataclass
class Answers:
  """What the network said of the images of a pass, in their order; the first `done` are known.

  Attributes:
    top1: bool (images,), whether the label is the likeliest class.
    top5: bool (images,), whether it is among the five likeliest.
    loss: float32 (images,), nats.
    confidence: float32 (images,), the probability of the likeliest class.
    done: number of images.
  """

  top1: np.ndarray
  top5: np.ndarray
  loss: np.ndarray
  confidence: np.ndarray
  done: int = 0

  @classmethod
  def none_of(cls, images: int) -> "Answers":
    """Of so many images, none of which is known."""
    return cls(np.zeros(images, bool), np.zeros(images, bool), np.zeros(images, np.float32),
               np.zeros(images, np.float32))

  def add(self, said: Mapping[str, np.ndarray]) -> None:
    """Takes what `measure_step` gave of the next batch; padding is left out."""
    index = np.asarray(said["index"])
    real = index >= 0
    if not np.array_equal(np.sort(index[real]), self.done + np.arange(real.sum())):
      raise AssertionError(f"images {index[real]} were counted where {self.done} was the next")
    for name in ("top1", "top5", "loss", "confidence"):
      getattr(self, name)[index[real]] = np.asarray(said[name])[real]
    self.done += int(real.sum())


class Measurer:
  """Compiled evaluations of one network; the weights are arguments.

  What is measured is the ordinary network with the batch norms of one domain: whichever domain
  that is, the program is the same. Images are shown by one program and judged by another, so that
  an attacker is compiled once, and the network too.
  """

  def __init__(self, model: Network, config: ml_collections.FrozenConfigDict,
               between: Callable[[], None] = lambda: None):
    """Compiles nothing yet.

    Args:
      model: with all domains.
      config: resolved; its `eval` and `data` say how batches are made.
      between: called before every batch; what it raises ends the pass.
    """
    self._model, self._config, self._between = model, config, between
    self._ordinary = model.clone(domains=model.domains[:1])
    self._programs: dict[tuple, Program] = {}    # by what they are of, and images of a batch
    self._size = config.eval.batch_size // jax.process_count()

  def start(self, variables: Mapping[str, Any], passes: Iterable[Pass]) -> None:
    """Lets threads compile what passes need, and does not wait for them. Not in a pod.

    Args:
      variables: of the model.
      passes: those that are to come; an image of each is read, for its shape.

    Raises:
      InputError: such an image cannot be read.
    """
    for one in passes:
      given, batch = self._given(variables, one), self.batches(one).example()
      shown = self._show(one, self._size).start(given["shown"], batch)
      self._judge(self._size).start(given["judged"], {**batch, "image": shown})

  def answers(self, variables: Mapping[str, Any], one: Pass, name: str = "",
              kept: pathlib.Path | None = None) -> Answers:
    """Goes through the images of a pass, each once.

    Args:
      variables: of the model.
      one: the pass.
      name: of what is measured; with it, a long pass shows its progress.
      kept: file for partial results; a pass that was interrupted goes on where it was kept.

    Raises:
      InputError: an image cannot be read, or the loss of one is not finite; and what `between`
        raises.
    """
    settings, given = self._config.eval, self._given(variables, one)
    show, judge = self._show(one, self._size), self._judge(self._size)
    key = None                         # of process 0, which alone reads and writes
    if kept and agreement.is_first():
      with contextlib.suppress(InputError):   # of an image: who comes to it will say so
        key = fingerprint(self._model, self._config, one, given)
    answers = kept_by_first(kept, key, len(one.source))
    batches = self.batches(one)
    first = -(-answers.done // settings.batch_size)
    if answers.done < len(one.source):   # it was kept by batches of another size, perhaps
      first = answers.done // settings.batch_size
      answers.done = first * settings.batch_size
    progress = _LongProgress(name, len(batches), first, settings.batch_size)
    saved, running = time.monotonic(), []
    for batch in _of_this_process(batches.starting_at(first)):
      self._between()
      running.append(judge(given["judged"], {**batch, "image": show(given["shown"], batch)}))
      # One step late, so that the next batch is made and travels while this one is computed.
      while len(running) > (not parallel.wait_each_step()):
        answers.add(jax.device_get(running.pop(0)))
        progress.update(-(-answers.done // settings.batch_size))
        if key and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
          key = write_kept(kept, key, answers)
          saved = time.monotonic()
    for said in jax.device_get(running):
      answers.add(said)
    if answers.done != len(one.source):
      raise AssertionError(f"{answers.done} images counted, {len(one.source)} are there")
    if key:
      write_kept(kept, key, answers)
    _require_finite(answers, one)
    return answers

  def batches(self, one: Pass) -> loader.EvaluationBatches:
    """The images of a pass, of `parallel.shard`, as the config says how they are made."""
    data, workers = self._config.data, self._config.eval.num_workers
    if workers is None:
      workers = data.num_workers or (one.slow_images and parallel.local_cores())
    return loader.evaluation_batches(
        one.source, batch_size=self._config.eval.batch_size, transform=one.transform,
        process_index=jax.process_index(), process_count=jax.process_count(),
        num_workers=workers, num_threads=data.num_threads, finish=parallel.shard)

  def look(self, variables: Mapping[str, Any], one: Pass, images: Mapping[str, np.ndarray]
           ) -> dict[str, Any]:
    """What the network is shown of a few images of a pass, and says of them.

    Every process of a pod has to ask, and sees all of them.

    Args:
      variables: of the model.
      one: the pass.
      images: {"image": uint8 (n, size, size, 3), "label": int32 (n,), "index": int32 (n,), their
        places in the pass's source, on which an attack's draws depend}.

    Returns:
      {"shown": float32 (n, size, size, 3) in [-1, 1], "said": {domain: (n,), the likeliest class}},
      by the main domain and the pass's own.
    """
    number, devices, size = len(images["label"]), jax.local_device_count(), self._size
    if (self._attacker(one), size) not in self._programs or size < number:
      size = -(-number // devices) * devices     # no more memory than that where none was needed
    batch = parallel.shard({"mask": np.ones(size, bool), **{
        name: np.resize(value, (size, *value.shape[1:])) for name, value in images.items()}})
    given = {domain: self._given(variables, dataclasses.replace(one, domain=domain))
             for domain in (self._model.domains[0], one.domain)}
    shown, said = self._show(one, size)(given[one.domain]["shown"], batch), {}
    for domain in given:
      answer = jax.device_get(
          self._judge(size)(given[domain]["judged"], {**batch, "image": shown}))
      by_place = dict(zip(answer["index"].tolist(), answer["said"].tolist(), strict=True))
      said[domain] = np.array([by_place[place] for place in images["index"].tolist()])
    return {"shown": parallel.local(shown)[:number], "said": said}

  def _given(self, variables, one):
    """The first argument of each compiled step, on the devices."""
    classes = np.ones(self._model.num_classes, bool)
    if one.classes is not None:
      classes[:] = False
      classes[list(one.classes)] = True
    measured = of_domain(variables, one.domain)
    given = {"shown": {}, "judged": {"variables": measured, "classes": classes}}
    if one.attack is not None:
      given["shown"] = {
          "variables": one.surrogate.variables if one.surrogate else measured,
          "strength": np.array([one.attack.epsilon, one.attack.step_size], np.float32)}
    return jax.device_put(given, parallel.replicated())

  def _attacker(self, one: Pass) -> Attacker | None:
    """Who makes what is shown: the same for all sets and strengths of a kind."""
    if one.attack is None:
      return None
    attack = dataclasses.replace(one.attack, epsilon=0.0, step_size=0.0)     # are arguments
    return Attacker(attack, one.surrogate.model if one.surrogate else self._ordinary, one.restarts)

  def _show(self, one: Pass, size: int) -> Program:
    """What makes the images that are shown, in batches of so many of this process."""
    attacker = self._attacker(one)
    return self._program(attacker, size, functools.partial(shown_step, attacker), of_batch=True)

  def _judge(self, size: int) -> Program:
    """What tells of the images that are shown, in batches of so many of this process."""
    return self._program("judge", size, functools.partial(
        measure_step, self._ordinary, axis_name=parallel.AXIS))

  def _program(self, of, size, step, **settings):
    if (of, size) not in self._programs:
      self._programs[of, size] = Program(parallel.pmap(step, **settings), step.func.__name__)
    return self._programs[of, size]


def _of_this_process(batches: Iterator[Batch]) -> Iterator[Batch]:
  """The batches; of what is wrong with them, the other processes of a pod know nothing."""
  try:
    yield from batches
  except InputError as error:
    raise (error if agreement.alone() else LocalError(str(error))) from error


def row(one: Pass, answers: Answers) -> Row:
  """A row of the table: the mean over the sets of a pass, each of the same weight."""
  rows = list(rows_of_sets(one, answers).values())
  if len(rows) == 1:
    return rows[0]
  names = ("top1", "top5", "loss", "ece")
  total = {name: math.fsum(each[name] for each in rows) / len(rows) for name in names}
  if one.same_images:                  # the sets are not independent, the images are
    by_image = answers.top1.reshape(len(rows), -1).mean(0)
    error = float(by_image.std(ddof=1) / math.sqrt(len(by_image))) if len(by_image) > 1 else None
  else:
    error = math.sqrt(math.fsum(each["standard_error"] ** 2 for each in rows)) / len(rows)
  return {**total, "images": len(answers.top1), "standard_error": error}


def rows_of_sets(one: Pass, answers: Answers) -> dict[str, Row]:
  """{set: its row}."""
  ends = np.cumsum(list(one.sets.values()))
  return {name: _row_of(answers, slice(end - size, end))
          for (name, size), end in zip(one.sets.items(), ends, strict=True)}


def _row_of(answers: Answers, chosen: slice) -> Row:
  top1, images = answers.top1[chosen], len(answers.top1[chosen])
  share = float(top1.mean())
  return {"top1": share, "top5": float(answers.top5[chosen].mean()),
          "loss": float(answers.loss[chosen].mean(dtype=np.float64)),
          "ece": calibration_error(answers.confidence[chosen], top1), "images": images,
          "standard_error": math.sqrt(share * (1 - share) / images)}


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
  """ECE: the mean over images of |accuracy - mean confidence| of their bin, in [0, 1].

  Args:
    confidence: (images,), in [0, 1].
    right: bool (images,).
    bins: of equal width, closed above.

  *Source:* Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
  """
  number = np.clip(np.ceil(confidence.astype(np.float64) * bins) - 1, 0, bins - 1).astype(int)
  gaps = np.bincount(number, right.astype(np.float64) - confidence.astype(np.float64), bins)
  return float(np.abs(gaps).sum() / len(right))


def fingerprint(model: Network, config: ml_collections.FrozenConfigDict, one: Pass,
                given: Mapping[str, Any]) -> str:
  """Of all that a pass's answers hang on: network, weights, images and attack.

  Of the images some are read, spread over all: a folder may be another one of the same name.

  Args:
    model: the network.
    config: resolved; names the network, and the size of its images.
    one: the pass.
    given: what the compiled steps are given.
  """
  digest = hashlib.blake2b(digest_size=16)
  flat = traverse_util.flatten_dict(jax.device_get(dict(given)), sep="/")
  for name in sorted(flat):
    value = np.asarray(flat[name])
    digest.update(f"{name} {value.dtype} {value.shape}".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  for place in np.linspace(0, len(one.source) - 1, SAMPLES).astype(int).tolist():
    record = one.source[place]
    digest.update(bytes(record["image"]) + str(record["label"]).encode())
  other = one.surrogate and [one.surrogate.name, _settings(one.surrogate.model)]
  facts = [config.model.name, config.data.image_size, _settings(model), other, one.source.name,
           one.source.split, dict(one.sets), one.domain, repr(one.attack), one.restarts]
  # Pickled, as the representation of a function has its address.
  digest.update(json.dumps(facts).encode() + pickle.dumps(one.transform))
  return digest.hexdigest()


def _settings(model: Network) -> dict[str, str]:
  """What the network is besides its weights, such as its type and its input convention."""
  names = ("domains", "dtype", "input_convention", "share_statistics", "share_affine")
  return {name: str(getattr(model, name)) for name in names}


def read_kept(path: pathlib.Path, key: str, images: int) -> Answers | None:
  """What `write_kept` wrote with the same key; None where there is nothing, or nothing whole."""
  try:
    with np.load(path, allow_pickle=False) as file:
      if str(file["key"]) != key or len(file["top1"]) != images:
        return None
      return Answers(file["top1"], file["top5"], file["loss"], file["confidence"],
                     int(file["done"]))
  except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
    return None


def kept_by_first(path: pathlib.Path | None, key: str | None, images: int) -> Answers:
  """What process 0 reads by `read_kept`, on every process: it alone writes, at moments of its own.

  Without a path, or anything there, of no image.
  """
  none = Answers.none_of(images)
  if path is None:
    return none
  read = (key and read_kept(path, key, images)) or none
  done = agreement.from_first(read.done)
  if not done:
    return none
  names = ("top1", "top5", "loss", "confidence")
  return Answers(**agreement.arrays_from_first({name: getattr(read, name) for name in names}),
                 done=done)


def write_kept(path: pathlib.Path, key: str, answers: Answers) -> str | None:
  """Writes partial results in one piece: whoever is killed here leaves the file before.

  Returns:
    The key; None where they cannot be written, which is said and ends nothing.
  """
  content = io.BytesIO()
  np.savez(content, key=key, **dataclasses.asdict(answers))
  try:
    make_workdir(str(path.parent))
    write_bytes(path, content.getvalue())
  except InputError as error:
    print(f"Warning: {error} The evaluation goes on without partial results.", file=sys.stderr)
    return None
  return key


def _require_finite(answers: Answers, one: Pass) -> None:
  """Raises an InputError where a loss is no number, or a label is none of the classes."""
  wrong = np.flatnonzero(~(answers.loss < -NEVER / 2))
  if not len(wrong):
    return
  origin = f"{one.source.name}, {one.source.split}"
  if not np.isfinite(answers.loss[wrong[0]]):
    raise InputError(f"{origin}: the network gives no numbers for {len(wrong)} of "
                     f"{len(answers.loss)} images, the first of them number {wrong[0]}; look at "
                     "the weights")
  name = one.source.class_names[one.source[int(wrong[0])]["label"]]
  raise InputError(f"{origin}: {len(wrong)} of its {len(answers.loss)} images are of classes that "
                   f"the set should not have, the first of them of {name!r}; remove these, or give "
                   "the set itself")


class _LongProgress:
  """Shows the progress of a pass that has a name, once it takes long."""

  def __init__(self, name: str, batches: int, first: int, images: int):
    name = name if agreement.is_first() else ""
    self._make = lambda step: Progress(batches, step, images, name=name)
    self._name, self._start, self._bar = name, time.monotonic(), None
    if name and 0 < first < batches:
      print(f"{name}: goes on after {first} of {batches} batches", flush=True)

  def update(self, step: int) -> None:
    if self._bar is None and self._name and time.monotonic() - self._start > _QUIET_SECONDS:
      self._bar = self._make(step)
    if self._bar is not None:
      self._bar.update(step)
