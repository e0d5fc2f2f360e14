"""A network on the test images: clean, and attacked through the batch norms of each kind."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable

import jax
import ml_collections

from advprop_jax import report
from advprop_jax.data import loader, sources, transforms
from advprop_jax.errors import InputError
from advprop_jax.experiment import Experiment, create_experiment, fresh_state
from advprop_jax.method.attack import Attack
from advprop_jax.method.step import Method, eval_step
from advprop_jax.runtime import parallel
from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.runtime.config import differences
from advprop_jax.runtime.metrics import read_json, table, write_json

BEST_METRIC = "clean_top1"
CLEAN = "clean"
MAIN, AUXILIARY = "adversarial, main BN", "adversarial, auxiliary BN"


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """A compiled evaluation of one kind.

  Attributes:
    step: (variables, sharded batch) -> sums, pmapped.
    source: the records to be counted, each once.
    batch_size: over all devices.
    image_size: pixels.
  """

  step: Callable
  source: sources.Source
  batch_size: int
  image_size: int

  def __call__(self, variables: dict) -> dict[str, float]:
    """{"top1" in [0, 1], "loss" in nats, "images"} of a model's variables."""
    batches = loader.evaluation_batches(
        self.source, batch_size=self.batch_size,
        transform=transforms.evaluation_transform(self.image_size),
        process_index=jax.process_index(), process_count=jax.process_count())
    sums = [self._step(variables, batch) for batch in batches]
    total = {name: float(sum(each[name] for each in sums)) for name in ("count", "correct", "loss")}
    if total["count"] != len(self.source):
      raise AssertionError(f"{total['count']} images counted, {len(self.source)} are there")
    return {"top1": total["correct"] / total["count"], "loss": total["loss"] / total["count"],
            "images": int(total["count"])}

  def _step(self, variables, batch):
    return jax.device_get(self.step(variables, parallel.shard(batch)))


def create_evaluators(experiment: Experiment) -> dict[str, Evaluator | None]:
  """An evaluator for each kind of accuracy; None where the network has no such batch norms."""
  method, config = experiment.method, experiment.config

  def evaluator(domain: str, attack: Attack | None) -> Evaluator:
    step = functools.partial(eval_step, method, domain=domain, attack=attack)
    return Evaluator(parallel.pmap(step), experiment.test_source, config.eval.batch_size,
                     config.data.image_size)

  auxiliary = attacked_domain(method)
  return {CLEAN: evaluator(method.scheme.domains[0], None),
          MAIN: evaluator(method.scheme.domains[0], experiment.eval_attack),
          AUXILIARY: auxiliary and evaluator(auxiliary, experiment.eval_attack)}


def attacked_domain(method: Method) -> str | None:
  """The auxiliary domain whose batch norms see adversarial images; None if there is none."""
  domains = [part.domain for part in method.scheme.made if part.attacked]
  return next((domain for domain in domains if domain != method.scheme.domains[0]), None)


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Evaluates a checkpoint of a run, prints the table, and writes it and the picture.

  Args:
    config: that of the run; `eval` may differ.
    workdir: where the run is.

  Returns:
    The summary, as it was written.

  Raises:
    InputError: bad config or data, or no checkpoint there that is whole.
  """
  experiment = create_experiment(config)
  config, abstract = experiment.config, jax.eval_shape(lambda: fresh_state(experiment))
  if os.path.exists(os.path.join(workdir, "config.json")):
    refuse_other_config(config, read_config(workdir), workdir, ignored=("eval", "checkpoint"))
  with Checkpoints(os.path.join(workdir, "checkpoints"), write=False,
                   best_metric=BEST_METRIC) as checkpoints:
    if config.eval.checkpoint == "best":
      restored = checkpoints.restore_best(abstract)
    else:
      restored = checkpoints.restore_latest(abstract)
  if restored is None:
    raise InputError(f"--workdir={workdir}: there is no checkpoint in it; train first, with "
                     "--mode=train")
  refuse_other_config(config, restored.config, workdir, ignored=("eval", "checkpoint"))
  evaluators = create_evaluators(experiment)
  return conclude(experiment, restored.state.evaluation_variables, restored.step, workdir,
                  evaluators)


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
      "weights": "moving averages" if config.train.ema_decay > 0 else "as trained",
      "attack": dataclasses.asdict(attack), "results": results, "training": training,
      "evaluation_seconds": round(seconds, 2), "devices": jax.device_count(),
      "device_kind": jax.devices()[0].device_kind}
  if jax.process_index() == 0:
    names = ("evaluation.json", "evaluation.png") if training is None else (
        "summary.json", "adversarial.png")
    write_json(os.path.join(workdir, names[0]), summary)
    picture = report.adversarial_picture(experiment, variables, attacked_domain(experiment.method))
    picture.save(os.path.join(workdir, names[1]))
    print("\n" + results_table(summary))
    print(f"\n{' and '.join(names)} are in {workdir}")
  return summary


def results_table(summary: dict) -> str:
  """The results of a summary as a plain-text table."""
  attack, rows = Attack(**summary["attack"]), []
  for name, result in summary["results"].items():
    images = name if name == CLEAN else f"{name} ({attack})"
    rows.append([images, *([None] * 3 if result is None else
                           [f"{100 * result['top1']:.2f}", f"{result['loss']:.4f}",
                            result["images"]])])
  return table(rows, ["test images", "top-1 %", "loss", "images"])


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


def refuse_other_config(config: ml_collections.ConfigDict, saved: dict, workdir: str,
                        ignored: tuple[str, ...] = ()) -> None:
  """Raises an InputError if a workdir holds a run of another config, and says what differs."""
  differing = differences(config.to_dict(), saved, ignored)
  if differing:
    more = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
    raise InputError(
        f"--workdir={workdir}: holds a run of another config; take another workdir, or set back "
        f"{', '.join(differing[:10])}{more} (saved -> given)")
