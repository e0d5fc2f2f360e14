"""What a network said of each image of a pass: the rows of the table, and answers kept on disk.

Sums, means and standard errors are made on the host, in float64.
"""

import dataclasses
import hashlib
import io
import json
import math
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from advprop_jax.benchmarks.contract import Pass, Row
from advprop_jax.errors import InputError
from advprop_jax.method.measure import NEVER
from advprop_jax.models.network import Network
from advprop_jax.runtime import agreement
from advprop_jax.runtime.metrics import write_bytes
from advprop_jax.runtime.workdir import make_workdir

SAMPLES = 16                           # images that are looked at before answers are taken over
BINS = 15                              # of confidence, for the calibration error


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


def require_finite(answers: Answers, one: Pass) -> None:
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
