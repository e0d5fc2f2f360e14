"""A network on every benchmark that was asked for: one table, as text, JSON and CSV."""

import dataclasses
import functools
import io
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import ml_collections

from advprop_jax import predict, trained
from advprop_jax.answers import row, rows_of_sets
from advprop_jax.benchmarks.contract import Benchmark, Measured, Subject, Surrogate, Unavailable
from advprop_jax.benchmarks.registry import BENCHMARKS
from advprop_jax.data.sources import Source
from advprop_jax.errors import InputError, LocalError
from advprop_jax.experiment import (
  Experiment,
  check_classes,
  evaluation_attack,
  open_network,
  open_split,
  resolve,
)
from advprop_jax.figures.sheet import adversarial_picture, examples_of
from advprop_jax.measure import Measurer
from advprop_jax.method.schemes import Scheme
from advprop_jax.models.network import Network
from advprop_jax.results import results_csv, results_table
from advprop_jax.runtime import agreement
from advprop_jax.runtime.faults import Preemption
from advprop_jax.runtime.fields import names_in
from advprop_jax.runtime.metrics import write_bytes, write_json, write_text
from advprop_jax.runtime.workdir import EVALUATED, make_workdir, require_shared

PARTIAL = "evaluation_partial"         # folder of what was measured before an interruption


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Measures a run, or published weights, prints the table, and writes it and a picture.

  No training images are needed; test images may be others than those of the run. With
  config.eval.photographs it says instead what these show.

  Args:
    config: that of the run; `eval` and which test images may differ. Where no run has begun in
      workdir, weights are those of config.model.pretrained.
    workdir: where the run is. Takes evaluation.json, evaluation.csv and evaluation.png.

  Returns:
    The summary, as it was written.

  Raises:
    InputError: bad config, no checkpoint there that is whole, or nothing that could be measured.
  """
  if config.get("eval") and config.eval.get("photographs") is not None:
    return predict.predict(config, workdir)
  if not agreement.alone():            # before any process looks into it
    make_workdir(workdir)
    require_shared(workdir)
  config = resolve(config, workdir)
  network = open_network(config, workdir, EVALUATED)
  make_workdir(workdir)
  model, variables = network.whole
  subject = create_subject(config, model, network.class_names,
                           functools.partial(open_test_images, config, network), network.scheme)
  trained_by = network.config or {"scheme": None, "seed": None}
  weights = {"scheme": trained_by["scheme"], "seed": trained_by["seed"],
             "step": network.step or 0,
             "weights": network.kind if trained.has_begun(workdir) else config.model.pretrained}
  with Preemption() as preemption:
    preemption.at_once()
    return conclude(subject, variables, weights, workdir,
                    Measurer(model, config, preemption.end_if_reached))


def open_test_images(config: ml_collections.FrozenConfigDict,
                     network: trained.TrainedNetwork) -> Source:
  """The test images of a config; an InputError where their classes are not the network's."""
  source = open_split(config.data, config.data.test_split)
  if network.class_names is None:
    if source.num_classes != network.num_classes:
      raise InputError(f"{config.data.name!r} has {source.num_classes} classes, the network has "
                       f"{network.num_classes}; train it first, or evaluate it on data of its own "
                       "classes")
    return source
  check_classes(config, network.class_names, source.class_names,
                "the run" if network.config else "the weights")
  return source


def create_subject(config: ml_collections.FrozenConfigDict, model: Network,
                   class_names: tuple[str, ...] | None, test: Callable[[], Source],
                   scheme: Scheme | None) -> Subject:
  """What is to be measured.

  Args:
    config: resolved.
    model: with all its domains.
    class_names: in the order of the logits; None where nobody knows.
    test: opens the test images, or raises an InputError.
    scheme: by which it was trained; None where nobody knows.

  Raises:
    InputError: the network of config.eval.transfer_from cannot be read, or has other classes.
  """
  surrogate = None
  if config.eval.transfer_from is not None and "transfer" in names_in(config.eval.benchmarks):
    surrogate = open_surrogate(config, model.num_classes, class_names)

  @functools.cache
  def open_test():
    try:
      return test()
    except InputError as error:
      raise Unavailable(str(error)) from error

  return Subject(config=config, model=model, class_names=class_names,
                 auxiliary=scheme and attacked_domain(scheme, model.domains),
                 attack=evaluation_attack(config), open_test=open_test, surrogate=surrogate)


def open_surrogate(config: ml_collections.FrozenConfigDict, num_classes: int,
                   class_names: tuple[str, ...] | None) -> Surrogate:
  """The network of config.eval.transfer_from; an InputError if it has other classes."""
  source = config.eval.transfer_from
  name = config.eval.transfer_network or (
      None if trained.is_ours(source) else config.model.name)
  try:
    other = trained.read(source, name)
    model = other.model
  except InputError as error:
    raise InputError(str(error).replace("config.model.pretrained", "config.eval.transfer_from")
                     .replace("config.model.name", "config.eval.transfer_network")) from error
  names_differ = other.class_names and class_names and other.class_names != class_names
  if other.num_classes != num_classes or names_differ:
    raise InputError(f"config.eval.transfer_from={source!r}: its {other.num_classes} classes are "
                     f"not the {num_classes} of the network that is measured; give one of the "
                     "same classes")
  return Surrogate(f"{other.name} of {trained.public_name(source)}", model, other.deployed)


def subject_of(experiment: Experiment) -> Subject:
  """What an experiment trains."""
  return create_subject(experiment.config, experiment.method.model,
                        experiment.train_source.class_names, lambda: experiment.test_source,
                        experiment.method.scheme)


def attacked_domain(scheme: Scheme, domains: tuple[str, ...]) -> str | None:
  """Which of the domains besides the main one sees adversarial images; None if there is none."""
  attacked = [part.domain for part in scheme.made if part.attacked]
  return next((domain for domain in attacked if domain in domains[1:]), None)


def open_benchmarks(subject: Subject) -> tuple[dict[str, Benchmark], dict[str, str]]:
  """{name: benchmark} of those that can be measured, and {name: reason} of the others.

  Raises:
    InputError: there is none that can be measured.
  """
  found, skipped = {}, {}
  asked = names_in(subject.config.eval.benchmarks)
  for name in (name for name in BENCHMARKS if name in asked):
    try:
      found[name] = BENCHMARKS[name](subject)
    except InputError as error:
      skipped[name] = str(error)
  if not found:
    refuse_nothing(subject, skipped)
  return found, skipped


def refuse_nothing(subject: Subject, skipped: Mapping[str, str]) -> NoReturn:
  """Raises the InputError of an evaluation in which there was nothing to measure."""
  reasons = "; ".join(dict.fromkeys(skipped.values()))
  raise InputError(f"config.eval.benchmarks={subject.config.eval.benchmarks!r}: none of them can "
                   f"be measured ({reasons}); launch/README.md says how to get images")


def measure(subject: Subject, variables: Mapping[str, Any], measurer: Measurer,
            kept: pathlib.Path | None = None) -> dict[str, Any]:
  """{"results": {row: ...}, "details": {benchmark: ...}, "skipped": {benchmark: reason}}.

  A benchmark whose images turn out to be wrong while it is measured is skipped as well.

  Args:
    subject: what is measured.
    variables: of its model.
    measurer: of its model.
    kept: folder for partial results; None to keep none.

  Raises:
    InputError: nothing could be measured.
  """
  benchmarks, skipped = open_benchmarks(subject)
  agreement.require_same({"images to evaluate on": {
      title: len(one.source) for benchmark in benchmarks.values()
      for title, one in benchmark.passes.items()}})
  results, details = {}, {}
  for name, benchmark in benchmarks.items():
    try:
      measured = run_passes(benchmark, variables, measurer, kept)
    except LocalError:
      raise
    except InputError as error:
      skipped[name] = str(error)
      continue
    for title, one in benchmark.passes.items():
      results[title] = {
          "benchmark": name, **measured.rows[title],
          "attack": one.attack and dataclasses.asdict(one.attack), "restarts": one.restarts,
          "data": f"{one.source.name}, {one.source.split}" if len(one.sets) == 1
                  else one.source.name,
          "sets": measured.sets[title]}
    further = benchmark.details(measured, results)
    if further:
      details[name] = further
  if not results:
    refuse_nothing(subject, skipped)
  return {"results": results, "details": details, "skipped": skipped}


def run_passes(benchmark: Benchmark, variables: Mapping[str, Any], measurer: Measurer,
               kept: pathlib.Path | None) -> Measured:
  """What the passes of a benchmark give; `kept` as of `measure`."""
  measured = Measured({}, {})
  for title, one in benchmark.passes.items():
    file = kept and kept / f"{title.replace('/', '_').replace(' ', '_')}.npz"
    answers = measurer.answers(variables, one, title, file)
    measured.rows[title] = row(one, answers)
    measured.sets[title] = rows_of_sets(one, answers)
  return measured


def draw(subject: Subject, variables: Mapping[str, Any], measurer: Measurer, path: pathlib.Path
         ) -> bool:
  """Writes the picture; where a process cannot read its images it says so, and there is none."""
  images, reason = None, None
  try:
    images = examples_of(subject)
  except InputError as error:
    reason = str(error)
  reason = agreement.first_of(reason)  # or one process would wait for another that has no images
  if reason:
    if agreement.is_first():
      path.unlink(missing_ok=True)     # of an earlier evaluation
      print(f"No picture of adversarial images: {reason}")
    return False
  content = io.BytesIO()
  adversarial_picture(subject, variables, measurer, images).save(content, "png")
  if agreement.is_first():
    write_bytes(path, content.getvalue())
  return True


def conclude(subject: Subject, variables: Mapping[str, Any], weights: Mapping[str, Any],
             workdir: str, measurer: Measurer, training: dict | None = None) -> dict:
  """Measures all that was asked for, and shows it.

  At the end of a training it writes summary.json, summary.csv and adversarial.png; later
  evaluations, whose settings may be others, write evaluation.json, .csv and .png. What was measured
  before an interruption is not measured again.

  Args:
    subject: what is measured.
    variables: of the model; moving averages where the run keeps them.
    weights: what they are: {"scheme", "seed": by which they were trained, None where nobody knows;
      "step": number of updates; "weights": which, for people to read}.
    workdir: for the files.
    measurer: of this model.
    training: what is known of the training that ends here, to be kept in the summary; None where
      none ends.

  Returns:
    The summary.
  """
  start, config = time.perf_counter(), subject.config
  partial = pathlib.Path(workdir, PARTIAL)
  measured = measure(subject, variables, measurer, partial)
  seconds = time.perf_counter() - start
  summary = {
      "network": config.model.name, **weights,
      "data": f"{config.data.name}, {config.data.test_split}", "imagenet": subject.knows_imagenet,
      "imagenet_validation": subject.tests_on_validation,
      "attack": dataclasses.asdict(subject.attack), **measured, "training": training,
      "evaluation_seconds": round(seconds, 2), "processes": jax.process_count(),
      "devices": jax.device_count(), "device_kind": jax.devices()[0].device_kind}
  name, picture = ("evaluation",) * 2 if training is None else ("summary", "adversarial")
  files = [f"{name}.json", f"{name}.csv"]
  if agreement.is_first():
    write_json(os.path.join(workdir, files[0]), summary)
    write_text(os.path.join(workdir, files[1]), results_csv(summary))
    shutil.rmtree(partial, ignore_errors=True)
    print("\n" + results_table(summary) + "\n", flush=True)
  if draw(subject, variables, measurer, pathlib.Path(workdir, f"{picture}.png")):
    files.append(f"{picture}.png")
  if agreement.is_first():
    print(f"{', '.join(files[:-1])} and {files[-1]} are in {workdir}")
  return summary
