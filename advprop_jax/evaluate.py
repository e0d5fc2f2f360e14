"""A network on the test images: clean, and attacked through the batch norms of each kind."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable

import jax
import ml_collections

from advprop_jax import predict
from advprop_jax.data import loader
from advprop_jax.errors import InputError
from advprop_jax.experiment import (
  Experiment,
  check_classes,
  create_experiment,
  fresh_state,
  initial_state,
)
from advprop_jax.figures.sheet import adversarial_picture
from advprop_jax.method.attack import Attack
from advprop_jax.method.state import TrainState
from advprop_jax.method.step import Method, eval_step
from advprop_jax.runtime import parallel
from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.runtime.metrics import table, write_json
from advprop_jax.runtime.workdir import (
  EVALUATED,
  LATER,
  make_workdir,
  refuse_other_config,
  refuse_other_run,
)
from advprop_jax.trained import BEST_METRIC, NOTHING, has_begun, read_classes

CLEAN = "clean"
MAIN, AUXILIARY = "adversarial, main BN", "adversarial, auxiliary BN"


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """A compiled evaluation of one kind.

  Attributes:
    step: (variables, sharded batch) -> sums, pmapped.
    batches: of the records to be counted, each once.
    images: how many these are.
  """

  step: Callable
  batches: loader.EvaluationBatches
  images: int

  def __call__(self, variables: dict) -> dict[str, float]:
    """{"top1" in [0, 1], "loss" in nats, "images"} of a model's variables."""
    sums, running = [], []
    for batch in self.batches:
      running.append(self.step(variables, parallel.shard(batch)))
      # One step late, so that the next batch is made and travels while this one is computed.
      while len(running) > (not parallel.wait_each_step()):
        sums.append(jax.device_get(running.pop(0)))
    sums += jax.device_get(running)
    total = {name: float(sum(each[name] for each in sums)) for name in ("count", "correct", "loss")}
    if total["count"] != self.images:
      raise AssertionError(f"{total['count']} images counted, {self.images} are there")
    return {"top1": total["correct"] / total["count"], "loss": total["loss"] / total["count"],
            "images": int(total["count"])}


def create_evaluators(experiment: Experiment) -> dict[str, Evaluator | None]:
  """An evaluator for each kind of accuracy; None where the network has no such batch norms."""
  method, config = experiment.method, experiment.config
  batches = loader.evaluation_batches(
      experiment.test_source, batch_size=config.eval.batch_size,
      transform=experiment.evaluation_transform,
      process_index=jax.process_index(), process_count=jax.process_count(),
      num_workers=config.data.num_workers, num_threads=config.data.num_threads)

  def evaluator(domain: str, attack: Attack | None) -> Evaluator:
    step = functools.partial(eval_step, method, domain=domain, attack=attack)
    return Evaluator(parallel.pmap(step), batches, len(experiment.test_source))

  auxiliary = attacked_domain(method)
  return {CLEAN: evaluator(method.scheme.domains[0], None),
          MAIN: evaluator(method.scheme.domains[0], experiment.eval_attack),
          AUXILIARY: auxiliary and evaluator(auxiliary, experiment.eval_attack)}


def attacked_domain(method: Method) -> str | None:
  """The auxiliary domain whose batch norms see adversarial images; None if there is none."""
  domains = [part.domain for part in method.scheme.made if part.attacked]
  return next((domain for domain in domains if domain != method.scheme.domains[0]), None)


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Evaluates a run, or published weights, prints the table, and writes it and the picture.

  Only the test images are read, which may be others than those of the run.

  With config.eval.photographs it says instead what these show.

  Args:
    config: that of the run; `eval` and which test images may differ. Where no run has begun in
      workdir, weights are those of config.model.pretrained.
    workdir: where the run is.

  Returns:
    The summary, as it was written.

  Raises:
    InputError: bad config or data, or no checkpoint there that is whole.
  """
  if config.get("eval") and config.eval.get("photographs") is not None:
    return predict.predict(config, workdir)
  experiment = create_experiment(config, workdir, training=False)
  if not has_begun(workdir) and experiment.config.model.pretrained is not None:
    make_workdir(workdir)
    state, step = published_state(experiment), 0
  else:
    state, step = trained_state(experiment, workdir)
  evaluators = create_evaluators(experiment)
  return conclude(experiment, state.evaluation_variables, step, workdir, evaluators)


def published_state(experiment: Experiment) -> TrainState:
  """The state that training would start from; an InputError if it does not know the classes."""
  state, weights = initial_state(experiment)
  if not weights.keeps_classifier:
    raise InputError(
        f"config.model.pretrained={experiment.config.model.pretrained!r}: {weights}; train first, "
        "or evaluate on data of its own classes")
  return state


def trained_state(experiment: Experiment, workdir: str) -> tuple[TrainState, int]:
  """The state of a run's newest or best checkpoint, and its step."""
  config, abstract = experiment.config, jax.eval_shape(lambda: fresh_state(experiment))
  refuse_other_run(config, workdir, (*LATER, *EVALUATED))
  if has_begun(workdir):
    check_classes(config, read_classes(workdir), experiment.test_source.class_names, "the run")
  with Checkpoints(os.path.join(workdir, "checkpoints"), write=False,
                   best_metric=BEST_METRIC) as checkpoints:
    restored = checkpoints.restore_first(config.eval.checkpoint, abstract)
  if restored is None:
    raise InputError(f"--workdir={workdir}: {NOTHING}")
  refuse_other_config(config, restored.config, workdir, ignored=(*LATER, *EVALUATED))
  return restored.state, restored.step


def conclude(experiment: Experiment, variables: dict, step: int, workdir: str,
             evaluators: dict[str, Evaluator | None], training: dict | None = None) -> dict:
  """Measures all that there is to measure, and shows it.

  At the end of a training it writes summary.json and adversarial.png; later evaluations, whose
  settings may be others, write evaluation.json and evaluation.png.

  Args:
    experiment: the run.
    variables: of the model; moving averages where the run keeps them.
    step: number of updates behind them.
    workdir: for the two files.
    evaluators: of this experiment.
    training: what is known of the training that ends here, to be kept in the summary; None where
      none ends.

  Returns:
    The summary.
  """
  start = time.perf_counter()
  results = {name: evaluator and evaluator(variables) for name, evaluator in evaluators.items()}
  seconds = time.perf_counter() - start
  config, attack = experiment.config, experiment.eval_attack
  summary = {
      "scheme": config.scheme, "network": config.model.name, "seed": config.seed, "step": step,
      "weights": weights_of(config, step),
      "data": f"{config.data.name}, {config.data.test_split}",
      "attack": dataclasses.asdict(attack), "results": results, "training": training,
      "evaluation_seconds": round(seconds, 2), "devices": jax.device_count(),
      "device_kind": jax.devices()[0].device_kind}
  if jax.process_index() == 0:
    names = ("evaluation.json", "evaluation.png") if training is None else (
        "summary.json", "adversarial.png")
    write_json(os.path.join(workdir, names[0]), summary)
    picture = adversarial_picture(experiment, variables, attacked_domain(experiment.method))
    picture.save(os.path.join(workdir, names[1]))
    print("\n" + results_table(summary))
    print(f"\n{' and '.join(names)} are in {workdir}")
  return summary


def weights_of(config: ml_collections.ConfigDict, step: int) -> str:
  """Which weights are evaluated after so many updates, for people to read."""
  if not step and config.model.pretrained is not None:
    return config.model.pretrained
  return "moving averages" if config.train.ema_decay > 0 else "as trained"


def results_table(summary: dict) -> str:
  """The results of a summary as a plain-text table."""
  attack, rows = Attack(**summary["attack"]), []
  for name, result in summary["results"].items():
    images = name if name == CLEAN else f"{name} ({attack})"
    rows.append([images, *([None] * 3 if result is None else
                           [f"{100 * result['top1']:.2f}", f"{result['loss']:.4f}",
                            result["images"]])])
  return table(rows, ["test images", "top-1 %", "loss", "images"])
