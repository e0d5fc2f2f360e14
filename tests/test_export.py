"""Whoever loads an export gets the network that was trained."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from advprop_jax import export as exporting
from advprop_jax import trained
from advprop_jax.errors import InputError
from advprop_jax.evaluate import evaluate
from advprop_jax.experiment import create_experiment, initial_state, open_network
from advprop_jax.export import FORMATS, export
from advprop_jax.models.batch_norm import drop_auxiliary
from advprop_jax.models.weights import from_state_dict, timm_name
from advprop_jax.predict import classifier
from advprop_jax.runtime.fields import EXPORT_FORMATS
from advprop_jax.train import claim_workdir
from tests.small_run import make_config

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)


@pytest.fixture
def timm_knows_it(monkeypatch):
  """As if timm had the network of one block."""
  monkeypatch.setattr(exporting.weights, "TIMM_NAMES", ("one_block",))


def exported(run, folder, **changes):
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.export.dir = str(folder)
  for name, value in changes.items():
    config.export[name] = value
  return pathlib.Path(export(config, workdir))


def test_formats_are_those_of_the_config():
  assert tuple(FORMATS) == EXPORT_FORMATS


def test_timm_tensors_are_the_moving_averages_of_the_main_batch_norms(run, tmp_path, timm_knows_it):
  """Fails where the last weights or another domain's are written, or a bit is lost."""
  folder = exported(run, tmp_path / "out")
  back = from_state_dict("one_block", safetensors.numpy.load_file(folder / "model.safetensors"))
  averages = trained.read_run(run[1])
  jax.tree.map(np.testing.assert_array_equal, back, drop_auxiliary(averages.variables))
  folder = exported(run, tmp_path / "weights", weights="trained")
  back = from_state_dict("one_block", safetensors.numpy.load_file(folder / "model.safetensors"))
  jax.tree.map(np.testing.assert_array_equal, back,
               drop_auxiliary(trained.read_run(run[1], kind=trained.TRAINED).variables))


def test_what_timm_has_to_know(run, tmp_path, timm_knows_it):
  """Fails where the JSON says another normalisation, size, crop or order of classes."""
  folder = exported(run, tmp_path / "out")
  facts = json.loads((folder / "config.json").read_text())
  assert facts["architecture"] == "tf_one_block"
  assert tuple(facts["label_names"]) == create_experiment(run[0]).train_source.class_names
  assert facts["pretrained_cfg"] == {
      "input_size": [3, 28, 28], "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 1.0,
      "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 10}
  network = trained.read(str(folder), "one_block")
  assert (network.input_convention, network.image_size) == ("inception", 28)
  assert network.class_names == tuple(facts["label_names"])


@pytest.mark.parametrize("convention", ["inception", "imagenet", "lite"])
def test_stablehlo_gives_the_logits_of_the_checkpoint(convention, published, tmp_path):
  """uint8 in, logits out, for any number of images; fails where the normalisation is not inside."""
  config = make_config({"model.pretrained": published(), "model.input_convention": convention,
                        "export.format": "stablehlo", "export.dir": str(tmp_path / "out")})
  folder = pathlib.Path(export(config, str(tmp_path / "none")))
  network = jax.export.deserialize((folder / "model.stablehlo").read_bytes())
  assert network.platforms == ("cpu", "cuda", "tpu")
  expected = classifier(open_network(config, "none"))(IMAGES)
  for number in (1, 5):
    logits = network.call(IMAGES[:number])
    np.testing.assert_allclose(logits, expected[:number], rtol=1e-4, atol=1e-4)
  facts = json.loads((folder / "preprocessing.json").read_text())
  assert (facts["resize_shorter_side"], facts["center_crop"]) == (28, 28)
  assert "/work" not in str(network.mlir_module())
  root = str(pathlib.Path(exporting.__file__).parents[1])
  assert root.encode() not in (folder / "model.stablehlo").read_bytes()  # no path of this machine


def test_a_checkpoint_is_what_training_can_start_from(run, tmp_path):
  folder = exported(run, tmp_path / "out", format="checkpoint")
  network = trained.read_exported(str(folder))
  images = jnp.asarray(IMAGES, jnp.float32) * 2 / 255 - 1
  np.testing.assert_allclose(network.model.apply(network.deployed, images),
                             classifier(open_network(*run))(IMAGES), rtol=1e-4, atol=1e-4)
  _, origin = initial_state(create_experiment(make_config({"model.pretrained": str(folder)})))
  assert origin.keeps_classifier


@pytest.mark.parametrize("kind", EXPORT_FORMATS)
def test_the_card_says_what_it_is(kind, run, tmp_path, timm_knows_it):
  """Fails where scheme, attack, data or results are missing, or a path of this machine is told."""
  _, workdir = run
  folder = exported(run, tmp_path / "out", format=kind)
  text = (folder / "README.md").read_text()
  with open(f"{workdir}/summary.json") as file:
    top1 = json.load(file)["results"]["clean"]["top1"]
  for words in ("advprop: 1 x L(clean", "PGD-1, epsilon 4, step 1 (0-255 units)", "bundled, train",
                "2 updates of 20 images", f"{100 * top1:.2f}", "moving averages", "28 x 28 RGB"):
    assert words in text, words
  assert workdir not in text
  assert str(tmp_path) not in text
  code = text.split("```python\n")[1].split("```")[0]
  assert len(code.strip().splitlines()) == 3
  if kind != "timm":  # tests/models/test_timm_parity.py
    values = {"images": IMAGES if kind == "stablehlo" else jnp.asarray(IMAGES, jnp.float32)}
    exec(code.replace("DIRECTORY", str(folder)), values)
    assert values["logits"].shape == (5, 10)


def test_results_of_other_weights_are_not_told(run, tmp_path):
  """The summary is that of the moving averages; fails where the card of others shows it."""
  folder = exported(run, tmp_path / "out", format="checkpoint", weights="trained")
  text = (folder / "README.md").read_text()
  assert "None were measured" in text
  assert "as trained" in text


def test_nothing_is_written_over(run, tmp_path):
  folder = exported(run, tmp_path / "out", format="checkpoint")
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  with pytest.raises(InputError, match=r"config.export.dir='.*out'.*is there already"):
    exported(run, tmp_path / "out", format="stablehlo")
  assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_network_that_timm_does_not_have(run, tmp_path):
  """Nothing is left of what was begun."""
  with pytest.raises(InputError, match=r"timm has no one_block.*stablehlo"):
    exported(run, tmp_path / "out", format="timm")
  assert not list(tmp_path.iterdir())
  assert timm_name("efficientnet_b0") == "tf_efficientnet_b0"
  assert timm_name("resnet200") == "resnet200"


def test_a_run_that_has_begun_is_not_mistaken_for_none(published, tmp_path):
  """Killed before its first checkpoint: fails where the published weights are exported for it."""
  config = make_config({"model.pretrained": published(), "model.input_convention": "inception"})
  claim_workdir(create_experiment(config), str(tmp_path / "run"))
  for verb in (export, evaluate):
    with pytest.raises(InputError, match=r"no checkpoint"):
      verb(config, str(tmp_path / "run"))


def test_weights_that_are_copied_away_alone_say_what_they_read(published, tmp_path, timm_knows_it):
  """Fails where a file without the JSON beside it is taken to be of another convention."""
  config = make_config({"model.pretrained": published(), "model.input_convention": "lite",
                        "export.dir": str(tmp_path / "out")})
  export(config, str(tmp_path / "none"))
  (tmp_path / "out" / "model.safetensors").rename(tmp_path / "alone.safetensors")
  network = trained.read(str(tmp_path / "alone.safetensors"), "one_block")
  assert network.input_convention == "lite"


def test_a_folder_that_cannot_be_written(run, tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(InputError, match=r"config.export.dir='.*cannot be written"):
    exported(run, tmp_path / "file" / "out", format="checkpoint")
