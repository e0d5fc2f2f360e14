"""What photographs show, and what becomes of files that are none."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from advprop_jax.errors import InputError
from advprop_jax.experiment import open_network
from advprop_jax.predict import classifier, find_files, likeliest, predict, read_images
from tests.small_run import make_config


@pytest.fixture
def photographs(tmp_path):
  """Three images, one of them lying on its side, and what is none."""
  folder = tmp_path / "photographs"
  (folder / "deep" / ".hidden").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name, shape in (("a.png", (40, 30, 3)), ("deep/b.jpg", (28, 28)), ("c.png", (28, 28, 3))):
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
  (folder / "broken.jpg").write_bytes((folder / "deep" / "b.jpg").read_bytes()[:200])
  (folder / "notes.txt").write_text("nothing")
  (folder / "deep" / ".hidden" / "d.png").write_bytes(b"x")
  return folder


def test_the_five_likeliest_classes_of_each_photograph(run, photographs, tmp_path, capsys):
  """Fails where images of different batches are mixed up, or a broken file ends it all."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.eval.photographs, config.eval.batch_size = str(photographs), 2
  result = predict(config, workdir)
  assert list(result["photographs"]) == ["a.png", "c.png", "deep/b.jpg"]
  assert set(result["not_read"]) == {"broken.jpg", "notes.txt"}
  network = open_network(config, workdir)
  pixels, _ = read_images(photographs, find_files(photographs), network)
  for path, answers in result["photographs"].items():
    logits = classifier(network)(pixels[path][None])[0]
    assert [answer["label"] for answer in answers] == np.argsort(-logits)[:5].tolist()
    probabilities = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose([answer["probability"] for answer in answers],
                               np.sort(probabilities)[::-1][:5], rtol=1e-4)
    assert [answer["name"] for answer in answers] == [
        network.class_names[answer["label"]] for answer in answers]
  printed = capsys.readouterr().out
  assert "not read: broken.jpg (" in printed
  assert "step 2, moving averages" in printed
  with open(f"{workdir}/predictions.json") as file:
    assert json.load(file) == result


def test_photographs_are_turned_upright(run, tmp_path):
  """Fails where the orientation in EXIF is not applied: cameras leave pixels as they are read."""
  upright = np.zeros((20, 40, 3), np.uint8)
  upright[:, 20:] = 255
  lying, exif = Image.fromarray(np.rot90(upright)), Image.Exif()
  exif[274] = 6   # to be turned by 90 degrees, clockwise
  buffer = io.BytesIO()
  lying.save(buffer, "PNG", exif=exif)
  (tmp_path / "a.png").write_bytes(buffer.getvalue())
  pixels, _ = read_images(tmp_path, ["a.png"], open_network(*run))
  assert pixels["a.png"][:, :10].mean() < 5
  assert pixels["a.png"][:, -10:].mean() > 250


def test_fewer_classes_than_five(run):
  network = open_network(*run)
  assert len(likeliest(network, np.arange(10.0))) == 5
  assert [answer["label"] for answer in likeliest(network, np.array([1.0, 3.0, 2.0]))] == [1, 2, 0]


@pytest.mark.parametrize(("make", "says"), [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_text("x"), "is a file"),
    (lambda path: path.mkdir(), "holds no files"),
    (lambda path: (path.mkdir(), (path / "a.jpg").write_text("x")), "none of its 1 files is an")])
def test_what_is_no_folder_of_photographs(make, says, run, tmp_path):
  config, workdir = run
  config = config.copy_and_resolve_references()
  make(tmp_path / "photographs")
  config.eval.photographs = str(tmp_path / "photographs")
  with pytest.raises(InputError, match=f"config.eval.photographs='.*{says}"):
    predict(config, workdir)


def test_neither_a_run_nor_weights(photographs, tmp_path):
  config = make_config({"eval.photographs": str(photographs)})
  with pytest.raises(InputError, match=r"--workdir=.*no checkpoint.*config.model.pretrained"):
    predict(config, str(tmp_path / "none"))


def test_another_size_of_images_can_be_asked_for(published):
  """Fails where the size of a config, or that of the weights' JSON, is dropped."""
  path = published(description={"input_size": [3, 40, 40], "crop_pct": 0.8})
  settings = {"model.pretrained": path, "model.input_convention": "inception"}
  network = open_network(make_config(settings), "none")
  assert (network.image_size, network.crop_fraction) == (40, 0.8)
  network = open_network(make_config(settings, **{"data.image_size": 36}), "none")
  assert (network.image_size, network.crop_fraction) == (36, 0.8)
