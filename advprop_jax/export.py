"""The deployed network, its auxiliary batch norms dropped, in a format that others read."""

import contextlib
import functools
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_collections

from advprop_jax import card
from advprop_jax.data import imagenet
from advprop_jax.data.transforms import scaled_side
from advprop_jax.errors import InputError, of_disk
from advprop_jax.experiment import open_network
from advprop_jax.models import weight_files, weights
from advprop_jax.models.conventions import CONVENTIONS
from advprop_jax.runtime.metrics import write_json
from advprop_jax.trained import TrainedNetwork, classify, write_exported

PLATFORMS = ("cpu", "cuda", "tpu")


def export(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes the network of a run, or of config.model.pretrained where none has begun in workdir.

  Args:
    config: `config.export` says what is written, and where.
    workdir: of the run.

  Returns:
    The folder that was written: the network, README.md (a model card) and a JSON that describes it.

  Raises:
    InputError: no network is there, the format cannot hold it, or the folder cannot be written.
  """
  network = open_network(config, workdir)
  kind = config.export.format
  folder = pathlib.Path(os.path.expanduser(
      config.export.dir or os.path.join(workdir, "export", kind)))
  part = folder.with_name(f".{folder.name}.part")
  if jax.process_index() != 0:
    return str(folder)
  try:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise InputError(f"config.export.dir={str(folder)!r}: is there already, and stays as it is; "
                       "remove it, or give another folder")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    FORMATS[kind](network, part)
    (part / "README.md").write_text(card.model_card(network, kind, workdir), encoding="utf-8")
    part.replace(folder)
  except OSError as error:
    raise of_disk(error, f"config.export.dir={str(folder)!r}: cannot be written",
                  "give another folder") from error
  finally:
    shutil.rmtree(part, ignore_errors=True)   # there only if something went wrong
  print(f"{network.name}, {network.source}: exported to {folder}\n" + "\n".join(
      f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes"
      for path in sorted(folder.iterdir()) if path.is_file()))
  return str(folder)


def write_timm(network: TrainedNetwork, folder: pathlib.Path) -> None:
  """model.safetensors and config.json, as timm has them on the Hugging Face hub.

  *Source:* timm, models/_hub.py, save_for_hf.
  """
  if network.name not in weights.TIMM_NAMES:
    raise InputError(f"config.export.format='timm': timm has no {network.name}; give 'stablehlo' "
                     "or 'checkpoint'")
  convention = CONVENTIONS[network.convention]
  description = {
      "architecture": weights.timm_name(network.name),
      "num_classes": network.num_classes,
      **_class_names(network),
      "pretrained_cfg": {
          "input_size": [3, network.image_size, network.image_size],
          "interpolation": "bicubic",
          "crop_mode": "center",
          # A little less than it is: timm divides by it and rounds down.
          "crop_pct": math.floor(network.crop_fraction * 1e4) / 1e4,
          "mean": convention.mean, "std": convention.std,
          "num_classes": network.num_classes}}
  tensors = weights.to_timm(network.name, network.deployed)
  weight_files.write_tensors(folder / weight_files.SAFETENSORS, tensors, description)
  write_json(folder / weight_files.DESCRIPTION, description)


def write_stablehlo(network: TrainedNetwork, folder: pathlib.Path) -> None:
  """model.stablehlo, weights and preprocessing inside, and preprocessing.json.

  It maps uint8 images (batch, size, size, 3), of any batch, to float32 logits (batch, classes).
  """
  size, program = network.image_size, jax.jit(
      functools.partial(classify, network.model, network.deployed))
  images = jax.ShapeDtypeStruct(
      jax.export.symbolic_shape(f"batch, {size}, {size}, 3"), jnp.uint8)
  with _without_paths():
    exported = jax.export.export(program, platforms=PLATFORMS)(images)
  (folder / "model.stablehlo").write_bytes(exported.serialize())
  write_json(folder / "preprocessing.json", {
      "input": f"uint8 (batch, {size}, {size}, 3), RGB; normalised inside",
      "output": f"float32 (batch, {network.num_classes}), logits",
      "resize_shorter_side": scaled_side(size, network.crop_fraction), "center_crop": size,
      "interpolation": "bicubic", "platforms": PLATFORMS, **_class_names(network)})


def write_checkpoint(network: TrainedNetwork, folder: pathlib.Path) -> None:
  """variables/ by Orbax, and network.json: what config.model.pretrained and read_exported take."""
  write_exported(network, str(folder))


FORMATS = {"timm": write_timm, "stablehlo": write_stablehlo, "checkpoint": write_checkpoint}


@contextlib.contextmanager
def _without_paths():
  """What is traced meanwhile does not hold where its source code lies on this machine."""
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update("jax_traceback_in_locations_limit", 0)
  try:
    yield
  finally:
    jax.config.update("jax_traceback_in_locations_limit", limit)


def _class_names(network: TrainedNetwork) -> dict:
  if network.class_names is None:
    return {}
  descriptions = {name: imagenet.words(name) for name in network.class_names}
  described = any(name != words for name, words in descriptions.items())
  return {"label_names": network.class_names,
          **({"label_descriptions": descriptions} if described else {})}
