"""The training loop: data in, pmapped step, metrics out, checkpoints, evaluation."""

import contextlib
import functools
import math
import os
import zlib
from collections.abc import Callable

import jax
import ml_collections

from advprop_jax.answers import row
from advprop_jax.benchmarks.adversarial import main_norms
from advprop_jax.benchmarks.contract import Pass, Subject, test_pass
from advprop_jax.data import loader, transforms
from advprop_jax.evaluate import conclude, subject_of
from advprop_jax.experiment import Experiment, create_experiment, fresh_state, initial_state
from advprop_jax.measure import Measurer
from advprop_jax.method.schemes import SECOND_VIEW
from advprop_jax.method.state import TrainState
from advprop_jax.method.step import train_step
from advprop_jax.models.batch_norm import drop_auxiliary
from advprop_jax.runtime import agreement, parallel
from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.runtime.compilation import Program, is_compiling
from advprop_jax.runtime.faults import RESUME, NotFinite, Preempted, Preemption, warned_of
from advprop_jax.runtime.fields import names_in
from advprop_jax.runtime.metrics import MetricsWriter, Progress, read_json, table, write_json
from advprop_jax.runtime.workdir import (
  LATER,
  RESTARTED,
  make_workdir,
  refuse_other_config,
  refuse_other_run,
  require_shared,
)
from advprop_jax.trained import BEST_METRIC, write_classes


def train(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Trains, or goes on where the newest checkpoint in workdir stands, and evaluates at the end.

  Args:
    config: see `runtime.config`.
    workdir: made if it is not there. Takes config.json, classes.json, checkpoints/, metrics.jsonl,
      tensorboard/, summary.json and adversarial.png.

  Returns:
    The summary, as it was written to summary.json.

  Raises:
    InputError: config, data or workdir cannot work, or the loss is not finite.
  """
  experiment = create_experiment(config, workdir)
  require_same_data(experiment)
  claim_workdir(experiment, workdir)
  subject = subject_of(experiment)
  with contextlib.ExitStack() as stack:
    preemption = stack.enter_context(Preemption())
    measurer = Measurer(experiment.method.model, experiment.config, preemption.end_if_reached)
    clean = test_pass(subject)
    checkpoints = stack.enter_context(Checkpoints(
        os.path.join(workdir, "checkpoints"), experiment.config.checkpoint.keep, BEST_METRIC))
    batches = open_batches(experiment, finish=parallel.shard)
    stack.callback(batches.close)
    step = Program(
        parallel.pmap(functools.partial(train_step, experiment.method), donate_state=True),
        "train_step", experiment.made_of)

    def start_step(state):
      if experiment.total_steps:
        step.start(state, batches.example())

    state, skips, weights = start_or_resume(experiment, checkpoints, batches, workdir, start_step)
    start = int(state.step)
    if agreement.is_first():
      print(describe(experiment, state, weights, workdir), flush=True)
    # Compilers of accelerators would try things out on the device that trains.
    if is_compiling() and jax.default_backend() == "cpu":
      measurer.start(state.evaluation_variables, passes_to_come(subject))
    state, speed = fit_past_faults(
        experiment, step, state, batches, checkpoints, preemption, workdir, skips,
        lambda variables: row(clean, measurer.answers(variables, clean)))
    checkpoints.wait()
    preemption.at_once()
    training = {"images_per_second": speed, "start_step": start}
    if start == experiment.total_steps:  # no step was made; what is known of those that were stays
      training = read_json(os.path.join(workdir, "summary.json")).get("training") or training
    return conclude(subject, state.evaluation_variables, weights_of(experiment), workdir, measurer,
                    training)


def passes_to_come(subject: Subject) -> list[Pass]:
  """Those over the test images whose programs serve all evaluations of a training."""
  attacked = "adversarial" in names_in(subject.config.eval.benchmarks)
  return [test_pass(subject), *(main_norms(subject).passes.values() if attacked else [])]


def weights_of(experiment: Experiment) -> dict[str, str | int]:
  """What the weights are that a training ends with, as `conclude` wants it."""
  config = experiment.config
  which = "moving averages" if config.train.ema_decay > 0 else "as trained"
  if not experiment.total_steps and config.model.pretrained is not None:
    which = config.model.pretrained
  return {"scheme": config.scheme, "seed": config.seed, "step": experiment.total_steps,
          "weights": which}


def fit_past_faults(experiment: Experiment, step_fn: Callable, state: TrainState, batches,
                    checkpoints: Checkpoints, preemption: Preemption, workdir: str, skips: int,
                    evaluate_clean: Callable) -> tuple[TrainState, float | None]:
  """`fit`; a loss that is not finite sends it back, as often as config.train.max_skips says.

  It then goes on from the newest checkpoint with the batch that follows the one of that loss. Where
  that one's loss is not finite either, it is the checkpoint that is doubted, and the one before it
  is gone back to.

  Args:
    experiment, step_fn, state, batches, checkpoints, preemption, evaluate_clean: as of `fit`.
    workdir: for the metrics.
    skips: how many times the run was sent back before.

  Returns:
    The state after the last step, and the images per second since the run was last sent back.
  """
  first, most, sent_back = agreement.is_first(), experiment.config.train.max_skips, False
  while True:
    start = int(state.step)
    with (MetricsWriter(workdir, start, writes=first) as writer,
          Progress(experiment.total_steps, start, experiment.config.data.batch_size,
                   shows=first) as progress):
      try:
        state = fit(experiment, step_fn, state, batches, checkpoints, preemption, writer, progress,
                    skips, evaluate_clean)
        return state, progress.images_per_second()
      except NotFinite as error:
        if skips >= most:
          raise
        skips += 1
        with warned_of(experiment.config.checkpoint.on_failure == "continue", progress.note):
          checkpoints.wait()
        if sent_back and error.step == start + 1:
          checkpoints.doubt(start)
        sent_back = True
        state, _, _ = start_or_resume(experiment, checkpoints, batches, workdir)
        batches.set_state({"batches": error.batches})
        progress.note(f"Warning: {error.what}; back to step {int(state.step)}, and past the "
                      f"batches since ({skips} of at most {most} times)")


def fit(experiment: Experiment, step_fn: Callable, state: TrainState, batches,
        checkpoints: Checkpoints, preemption: Preemption, writer: MetricsWriter, progress: Progress,
        skips: int, evaluate_clean: Callable) -> TrainState:
  """Runs the steps from the state's to the last one.

  The metrics of a step are read while the next one runs, so that the device never waits for the
  host. `step_fn` is the train step, (state, batch) -> (state, metrics), with its devices.

  Returns:
    The state after the last step, which the newest checkpoint holds too.

  Raises:
    NotFinite: the loss of a step, or its gradient.
    Preempted: the run was asked to end, and a checkpoint is written.
  """
  config, total = experiment.config, experiment.total_steps
  eval_every, save_every = experiment.every("eval"), experiment.every("checkpoint")
  tolerant = functools.partial(warned_of, config.checkpoint.on_failure == "continue", progress.note)
  before = batches.get_state()["batches"] - int(state.step)   # not 0 where batches were left out
  schedule = jax.jit(experiment.schedule)      # 20 operations, 4 ms one by one

  def save(step, results, needed):
    with tolerant():
      checkpoints.wait()             # for the one before, whose failure need not be this one's
    with contextlib.nullcontext() if needed else tolerant():
      checkpoints.save(step, state, {**batches.get_state(), "skips": skips}, config.to_dict(),
                       results and {BEST_METRIC: results["top1"]})

  def record(step, metrics):
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    require_finite(step, metrics, before + step)
    progress.update(step, loss=metrics["loss"])
    if experiment.due(step, config.train.log_every):
      speed = progress.images_per_second()
      with tolerant():
        writer.write(step, {
            **{f"train/{name}": value for name, value in metrics.items()},
            "train/learning_rate": float(schedule(step - 1)),
            "train/epoch": step / experiment.steps_per_epoch,
            **({} if speed is None else {"train/images_per_second": speed})})

  unread = None
  for step in range(int(state.step) + 1, total + 1):
    # The step before may still run here, as its metrics are read below. The call does not wait for
    # it, so this batch travels to the device meanwhile: to send it earlier would gain nothing. (On
    # the CPU a step has ended when its call has, and the batch is there.)
    state, metrics = step_fn(state, next(batches))
    if unread:
      record(*unread)
    unread = (step, metrics)
    stop_now = preemption.reached() and step < total
    evaluate_now = experiment.due(step, eval_every) and not stop_now
    save_now = experiment.due(step, save_every) or stop_now
    if evaluate_now or save_now or parallel.wait_each_step():
      record(*unread)
      unread = None
    results = None
    if evaluate_now:
      try:
        with progress.paused():
          results = evaluate_clean(state.evaluation_variables)
        with tolerant():
          writer.write(step, {"test/clean_top1": results["top1"],
                              "test/clean_loss": results["loss"]})
      except Preempted:                # the state is worth more than this evaluation
        stop_now, save_now = step < total, True
    if save_now:
      save(step, results, needed=stop_now or step == total)
    if stop_now:
      checkpoints.wait()
      raise Preempted(f"Stopped after step {step} of {total}, whose checkpoint is written; "
                      f"{RESUME}")
  return state


def start_or_resume(experiment: Experiment, checkpoints: Checkpoints,
                    batches: loader.TrainingBatches, workdir: str,
                    meanwhile: Callable[[TrainState], None] | None = None
                    ) -> tuple[TrainState, int, str]:
  """State of the newest whole checkpoint, or the initial one; skips so far; origin of the weights.

  The batches are put to where that state was. `meanwhile` is as of `initial_state`.
  """
  restored = None
  if agreement.from_first(checkpoints.steps()):   # to trace a state for its shapes takes a second
    restored = checkpoints.restore_latest(
        jax.eval_shape(functools.partial(fresh_state, experiment)))
  if restored is None:
    batches.set_state({"batches": 0})
    state, weights = initial_state(experiment, meanwhile)
    return jax.device_put(state, parallel.replicated()), 0, str(weights)
  refuse_other_config(experiment.config, restored.config, workdir, ignored=(*LATER, *RESTARTED))
  batches.set_state(restored.iterator)
  return (restored.state, restored.iterator.get("skips", 0),
          f"those of the checkpoint of step {restored.step}")


def open_batches(experiment: Experiment, **settings) -> loader.TrainingBatches:
  """What an experiment trains on, from its first batch on: this process's part of each.

  Further settings are those of `loader.training_batches`.
  """
  config = experiment.config
  views = {source: transforms.training_transform(config.data.image_size, augment,
                                                 config.data.padding, config.data.crop)
           for source, augment in {"image": config.data.augment,
                                   SECOND_VIEW: config.data.second_augment}.items()
           if augment is not None}
  return loader.training_batches(
      experiment.train_source, batch_size=config.data.batch_size,
      transform=views.pop("image"), more_views=views,
      seed=config.seed, num_workers=config.data.num_workers, num_threads=config.data.num_threads,
      process_index=jax.process_index(), process_count=jax.process_count(),
      skip_broken=config.data.broken == "skip", **settings)


def require_same_data(experiment: Experiment) -> None:
  """Raises an InputError where the processes of a pod do not see the same images."""
  sources = {"train": experiment.train_source, "test": experiment.test_source}
  agreement.require_same({
      **{f"images to {name}": len(source) for name, source in sources.items()},
      "classes": zlib.crc32("\n".join(experiment.train_source.class_names).encode())})


def claim_workdir(experiment: Experiment, workdir: str) -> None:
  """Checks that a config.json there is of the same run; writes it, and classes.json.

  Raises:
    InputError: workdir cannot be written, or holds a run of another config.
  """
  make_workdir(workdir)
  require_shared(workdir)
  refuse_other_run(experiment.config, workdir, RESTARTED)
  if agreement.is_first():
    write_json(os.path.join(workdir, "config.json"), experiment.config.to_dict())
    write_classes(workdir, experiment.train_source.class_names)


def require_finite(step: int, metrics: dict[str, float], batches: int = 0) -> None:
  """Raises a NotFinite if the loss of a step, or its gradient, is infinite or not a number."""
  if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
    name = "gradient" if math.isfinite(metrics["loss"]) else "loss"
    parts = ", ".join(f"{name} {value:g}" for name, value in metrics.items()
                      if name.startswith(("loss", "gradient")))
    what = f"step {step}: the {name} is not finite ({parts})"
    raise NotFinite(f"{what}; the checkpoints before it are kept; try a lower "
                    "config.optimizer.learning_rate in another --workdir, or "
                    "config.train.max_skips", what, step, batches)


def describe(experiment: Experiment, state: TrainState, weights: str, workdir: str) -> str:
  """The summary that a run begins with, a plain-text table."""
  config, attack = experiment.config, experiment.method.attack
  count = functools.partial(jax.tree.reduce, lambda total, x: total + x.size, initializer=0)
  main = count(drop_auxiliary(state.variables)["params"])
  scheme = experiment.method.scheme
  attacked = any(part.attacked for part in scheme.made)
  rows = [
      ["network", f"{config.model.name}, {config.data.image_size} px, {config.model.dtype}"],
      ["parameters", f"{main:,}, and {count(state.params) - main:,} of auxiliary batch norms"],
      ["weights", weights],
      ["scheme", f"{config.scheme}: {scheme}"],
      ["attack", f"{attack} (0-255), {attack.statistics} statistics" if attacked else None],
      ["data", f"{config.data.name}: {len(experiment.train_source):,} train, "
               f"{len(experiment.test_source):,} test, {experiment.train_source.num_classes} "
               "classes"],
      ["optimizer", f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, "
                    f"{config.optimizer.schedule}"],
      ["steps", f"{int(state.step):,} of {experiment.total_steps:,} done, {config.data.batch_size} "
                f"images each, {experiment.steps_per_epoch:.1f} an epoch" + (
                    f"; epochs of the config are divided by {scheme.budget:.3g}"
                    if scheme.same_budget else "")],
      ["devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
                  f"{jax.process_count()} process(es)"],
      ["workdir", workdir],
  ]
  return table(rows, ["run", ""])
