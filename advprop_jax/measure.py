"""Runs the passes of benchmarks: compiled once per kind, counted image by image, kept and resumed.

What the network says of each image is brought to the host, a few bytes an image (answers.py). So
the same compiled step serves any number of sets.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from advprop_jax.answers import Answers, fingerprint, kept_by_first, require_finite, write_kept
from advprop_jax.benchmarks.contract import Pass
from advprop_jax.data import loader
from advprop_jax.data.workers import Batch
from advprop_jax.errors import InputError, LocalError
from advprop_jax.method.measure import Attacker, measure_step, shown_step
from advprop_jax.models.batch_norm import of_domain
from advprop_jax.models.network import Network
from advprop_jax.runtime import agreement, parallel
from advprop_jax.runtime.compilation import Program
from advprop_jax.runtime.metrics import Progress

SECONDS_BETWEEN_SAVES = 60.0
_QUIET_SECONDS = 10.0                  # before progress is shown


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
    require_finite(answers, one)
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
