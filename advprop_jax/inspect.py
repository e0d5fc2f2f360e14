"""What the network will see, as one picture, and how fast the data alone comes."""

import dataclasses
import os
import textwrap
import time

import jax
import ml_collections
import numpy as np

from advprop_jax.data import imagenet
from advprop_jax.data.loader import Batch, TrainingBatches
from advprop_jax.experiment import Experiment, create_experiment, initial_state
from advprop_jax.figures.sheet import GREY, INK, LETTERS, Row, sheet
from advprop_jax.method.attack import PIXEL
from advprop_jax.method.schemes import Part
from advprop_jax.method.state import TrainState
from advprop_jax.method.step import make_parts, to_model_units
from advprop_jax.models.dropout import image_keys
from advprop_jax.runtime.metrics import table
from advprop_jax.runtime.workdir import make_workdir
from advprop_jax.train import open_batches

FILE = "inspect.png"
COLUMNS = 8                            # images of each kind
SECONDS, MOST_BATCHES = 3.0, 10_000    # that are measured


def inspect(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Writes FILE to workdir, measures the training data's speed, and prints a table of both.

  Args:
    config: of a run that need not have begun.
    workdir: made if it is not there.

  Returns:
    {"records": of the two splits, "classes", "image_size", "batch_size", "images_per_second": of
    this process, from a pipeline that is alone on its cores, "seconds": how long it was measured}.

  Raises:
    InputError: config, data or workdir cannot work.
  """
  experiment = create_experiment(config, workdir)
  make_workdir(workdir)
  batches = open_batches(experiment)
  try:
    batch = next(batches)
    images_per_second, seconds = measure(batches, read_ahead(experiment), SECONDS)
  finally:
    batches.close()
  state, _ = initial_state(experiment)
  picture = sheet(*contact_sheet(experiment, state, batch))
  result = {"records": [len(experiment.train_source), len(experiment.test_source)],
            "classes": experiment.train_source.num_classes,
            "image_size": experiment.config.data.image_size,
            "batch_size": experiment.config.data.batch_size,
            "images_per_second": images_per_second, "seconds": seconds}
  if jax.process_index() == 0:
    picture.save(os.path.join(workdir, FILE))
    print(describe(experiment, result))
    print(f"\n{FILE} is in {workdir}")
  return result


def read_ahead(experiment: Experiment) -> int:
  """At most how many batches may be ready before one asks: no measure of the pipeline's speed."""
  data = experiment.config.data
  return max(data.num_workers, 1) * (2 * data.num_threads + 2)


def measure(batches: TrainingBatches, skipped: int, seconds: float) -> tuple[float, float]:
  """Images per second, and over how many seconds, of what goes on when `skipped` were taken."""
  for _ in range(skipped):
    next(batches)
  images, start = 0, time.perf_counter()
  for _ in range(MOST_BATCHES):
    images += len(next(batches)["label"])
    if time.perf_counter() - start >= seconds:
      break
  passed = time.perf_counter() - start
  return images / passed, passed


def contact_sheet(experiment: Experiment, state: TrainState,
                  batch: Batch) -> tuple[str, list[Row], list]:
  """Title, rows and legend: each part of the first step, then test images.

  Args:
    experiment: its scheme says which parts there are.
    state: whose weights are attacked.
    batch: of training.
  """
  config, test = experiment.config, experiment.test_source
  names = [imagenet.words(name) for name in experiment.train_source.class_names]
  rows = []
  for part, (pixels, labels) in first_parts(experiment, state, batch).items():
    rows.append(Row(_caption(experiment, part), pixels, [[(names[i], INK) for i in labels]]))
  records = [test[place] for place in range(min(COLUMNS, len(test)))]
  rows.append(Row("test images,\nas evaluated",
                  np.stack([experiment.evaluation_transform(each["image"]) for each in records]),
                  [[(names[each["label"]], INK) for each in records]]))
  title = (f"{config.data.name}, {config.data.image_size} px, scheme {config.scheme}: the first "
           "images of the first step")
  attacked = any(part.attacked for part in experiment.method.scheme.made)
  legend = "Below an image: its label."
  if attacked:
    start = "pretrained" if config.model.pretrained else "fresh"
    legend += f" What is attacked: {config.model.name} with the {start} weights it starts from."
  return title, rows, [(0, legend, GREY)]


def first_parts(experiment: Experiment, state: TrainState,
                batch: Batch) -> dict[Part, tuple[np.ndarray, np.ndarray]]:
  """{part of the scheme: its first images, (n, h, w, 3) in 0-255, not rounded, and labels, (n,)}.

  As the first step makes them on one device, but for two things: an attack that grows has its full
  strength; and where it takes its statistics from the batch, they are those of the images shown.
  """
  scheme = experiment.method.scheme
  # So many that each part has its columns: one that takes one image in five needs 40.
  wanted = round(COLUMNS / min(map(scheme.share, scheme.made)))
  images = min(wanted, len(batch["label"])) // scheme.pieces * scheme.pieces
  model = experiment.method.model.clone(axis_name=None, group_size=1)     # not in pmap
  method = dataclasses.replace(experiment.method, model=model)

  @jax.jit
  def compute(state, batch):
    attack_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    sources = {part.source: to_model_units(batch[part.source]) for part in scheme.made}
    parts, *_ = make_parts(
        method, method.attack, state.params, state.batch_stats,
        {**sources, "label": batch["label"], "key": image_keys(attack_key, images)}, dropout_key)
    return parts

  parts = jax.device_get(compute(state, {name: value[:images] for name, value in batch.items()}))
  return {part: ((parts[part.name]["image"][:COLUMNS] + 1) / PIXEL,
                 parts[part.name]["label"][:COLUMNS]) for part in scheme.made}


def _caption(experiment: Experiment, part: Part) -> str:
  attack = str(experiment.method.attack).split(", ") if part.attacked else []
  lines = [part.name.replace("_", " "), *attack, f"BN: {part.domain}"]
  return "\n".join(line for text in lines for line in textwrap.wrap(text, LETTERS))


def describe(experiment: Experiment, result: dict) -> str:
  """What inspect says, a plain-text table."""
  data, speed = experiment.config.data, result["images_per_second"]
  cores = os.cpu_count() or 1
  second = f"; second view: {data.second_augment}" if data.second_augment else ""
  workers = f"{data.num_workers} worker processes, each of " if data.num_workers else ""
  return table([
      ["records", "{:,} train, {:,} test".format(*result["records"])],
      ["classes", f"{result['classes']:,}"],
      ["image size", f"{result['image_size']} px"],
      ["augmentations", f"crop {data.crop}, {data.augment}{second}"],
      ["batch size", str(result["batch_size"])],
      ["read by", f"{workers}{data.num_threads} threads"],
      ["images/s", f"{speed:,.0f}, measured for {result['seconds']:.1f} s without training"],
      ["of each core", f"{speed / cores:,.0f}, of {cores}"],
      ["of each worker", f"{speed / data.num_workers:,.0f}" if data.num_workers else None],
  ], ["data", ""])
