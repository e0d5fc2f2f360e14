"""What photographs without labels show: the five likeliest classes of each."""

import functools
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from advprop_jax.data.decode import BrokenImage, decode, reason
from advprop_jax.data.file_index import hidden
from advprop_jax.data.transforms import fit
from advprop_jax.errors import InputError
from advprop_jax.experiment import open_network
from advprop_jax.runtime.metrics import table, write_json
from advprop_jax.runtime.workdir import make_workdir
from advprop_jax.trained import TrainedNetwork, classify

TOP = 5
FILE = "predictions.json"
_THREADS = 4   # that read and decode


def predict(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Prints the likeliest classes of every image below config.eval.photographs, and writes them.

  Args:
    config: names the folder; its data set is not needed.
    workdir: of the run whose network is asked; that of config.model.pretrained is, where no run has
      begun. Takes FILE.

  Returns:
    What was written: {"network": ..., "photographs": {path: [{"label", "class", "name",
    "probability"}, ...]}, "not_read": {path: reason}}.

  Raises:
    InputError: no network, no folder, or no image that can be read in it.
  """
  make_workdir(workdir)
  network = open_network(config, workdir)
  folder = pathlib.Path(os.path.expanduser(config.eval.photographs))
  paths = find_files(folder)
  answers, faults = {}, {}
  logits_of = classifier(network)
  size = min(config.eval.batch_size, len(paths))
  for first in tqdm(range(0, len(paths), size), unit=" batches", delay=2, disable=None):
    pixels, broken = read_images(folder, paths[first:first + size], network)
    faults |= broken
    if pixels:
      batch = np.zeros((size, *next(iter(pixels.values())).shape), np.uint8)  # compiled once
      batch[:len(pixels)] = list(pixels.values())
      for path, logits in zip(pixels, logits_of(batch), strict=False):
        answers[path] = likeliest(network, logits)
  if not answers:
    raise InputError(f"config.eval.photographs={str(folder)!r}: none of its {len(paths)} files is "
                     f"an image that can be read ({'; '.join(list(faults.values())[:1])}); give a "
                     "folder of photographs")
  result = {"network": f"{network.name}, {network.source}", "photographs": answers,
            "not_read": faults}
  _show(result, workdir)
  return result


def classifier(network: TrainedNetwork) -> Callable[[np.ndarray], np.ndarray]:
  """The deployed network as a compiled function: uint8 (n, size, size, 3) -> float32 logits."""
  apply = jax.jit(functools.partial(classify, network.model))
  variables = jax.device_put(network.deployed)
  return lambda pixels: np.asarray(apply(variables, pixels))


def likeliest(network: TrainedNetwork, logits: np.ndarray) -> list[dict]:
  """The TOP classes of one image, the likeliest first.

  Args:
    network: whose logits they are.
    logits: (classes,).
  """
  exponentials = np.exp(np.float64(logits) - logits.max())
  probabilities = exponentials / exponentials.sum()
  labels = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
  return [{"label": label, "class": network.class_names and network.class_names[label],
           "name": network.class_name(label), "probability": float(probabilities[label])}
          for label in labels]


def find_files(folder: pathlib.Path) -> list[str]:
  """All files below a folder that are not hidden, sorted, as paths below it."""
  if not folder.is_dir():
    state = "is a file" if folder.exists() else "does not exist"
    raise InputError(f"config.eval.photographs={str(folder)!r}: {state}; give a folder of "
                     "photographs")
  paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
  paths = [str(path) for path in paths if not any(map(hidden, path.parts))]
  if not paths:
    raise InputError(f"config.eval.photographs={str(folder)!r}: holds no files; give a folder of "
                     "photographs")
  return paths


def read_images(folder: pathlib.Path, paths: list[str],
                network: TrainedNetwork) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Images as the network wants them, uint8 (size, size, 3) each, and why others cannot be read.

  They are turned upright as their EXIF says, as every viewer does.
  """
  def read(path):
    try:
      image = decode((folder / path).read_bytes(), upright=True)
    except (BrokenImage, OSError) as error:
      return reason(error)
    return fit(image, network.image_size, network.crop_fraction)

  with ThreadPoolExecutor(_THREADS) as threads:
    results = dict(zip(paths, threads.map(read, paths), strict=True))
  broken = {path: result for path, result in results.items() if isinstance(result, str)}
  return {path: result for path, result in results.items() if path not in broken}, broken


def _show(result: dict, workdir: str) -> None:
  if jax.process_index() != 0:
    return
  write_json(os.path.join(workdir, FILE), result)
  rows = []
  for path, answers in result["photographs"].items():
    rows += [[_printable(path) if place == 0 else "", f"{100 * answer['probability']:.1f}",
              answer["name"]] for place, answer in enumerate(answers)]
  print(f"{result['network']}\n\n{table(rows, ['photograph', '%', 'class'])}")
  for path, why in result["not_read"].items():
    print(f"not read: {_printable(path)} ({why})")
  print(f"\n{FILE} is in {workdir}")


def _printable(path: str) -> str:
  """A file's name on one line; Linux allows any bytes in it."""
  return path if path.isprintable() else ascii(path)
