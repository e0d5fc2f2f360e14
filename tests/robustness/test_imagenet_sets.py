"""Sets of ImageNet's classes, on hand-made folders, against a few lines of numpy."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from advprop_jax import models
from advprop_jax.benchmarks import imagenet_sets, published
from advprop_jax.benchmarks.mce import ALEXNET, SETTINGS
from advprop_jax.data.imagenet import CLASSES_OF_A, CLASSES_OF_R, WNIDS
from advprop_jax.errors import InputError
from advprop_jax.evaluate import evaluate
from advprop_jax.method.step import to_model_units
from tests import one_block
from tests.small_run import make_config

SIZE, IMAGES = 28, 12
SOME = (CLASSES_OF_A[0], CLASSES_OF_A[5], CLASSES_OF_A[9])


@pytest.fixture(scope="module")
def variables():
  """Of 1000 classes, with a classifier that says many of them."""
  one_block.register()
  model = models.create_model("one_block", 1000)
  images = to_model_units(np.stack([picture(np.random.default_rng(i)) for i in range(200)]))
  drawn = jax.device_get(model.init(jax.random.key(3), images))
  kernel = drawn["params"]["classifier"]["kernel"]
  drawn["params"]["classifier"]["kernel"] = np.random.default_rng(3).normal(
      0, 1, kernel.shape).astype(np.float32)
  logits = np.asarray(model.apply(drawn, images))
  drawn["params"]["classifier"]["bias"] = -logits.mean(0)
  return drawn


@pytest.fixture
def network(variables, tmp_path, monkeypatch):
  """A config with these weights."""
  import safetensors.numpy

  from advprop_jax.models.weights import to_timm
  safetensors.numpy.save_file(to_timm("one_block", variables), tmp_path / "weights.safetensors")
  return make_config({
      "model.pretrained": str(tmp_path / "weights.safetensors"),
      "model.input_convention": "inception", "data.name": "imagenet_folder",
      "data.dir": str(tmp_path / "data"), "data.test_split": "val", "eval.batch_size": 50})


def picture(rng):
  """Noise round some colour, uint8."""
  pixels = rng.normal(rng.integers(0, 256, 3), 40, (SIZE, SIZE, 3))
  return np.clip(pixels, 0, 255).astype(np.uint8)


def fill(folder, labels, seed):
  """PNGs of noise of several colours, their labels by class folder."""
  rng = np.random.default_rng(seed)
  for number, label in enumerate(labels):
    place = folder / WNIDS[label]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(rng)).save(place / f"{seed}_{number}.png")


def logits_of(variables, folder):
  """Logits and labels of every file below class folders, read by Pillow."""
  files = sorted(folder.glob("*/*.png"))
  images = np.stack([np.asarray(Image.open(file)) for file in files])
  model = models.create_model("one_block", 1000)
  return (np.asarray(model.apply(variables, to_model_units(images))),
          np.array([WNIDS.index(file.parent.name) for file in files]))


def labels_said(variables, folder):
  """Labels that the network does say of images like these, so that errors are between 0 and 1."""
  fill(folder, [0] * 40, 1)
  logits, _ = logits_of(variables, folder)
  return np.unique(logits.argmax(1))


@pytest.fixture(scope="module")
def corrupted(variables, tmp_path_factory):
  """A folder in ImageNet-C's layout, whose classes the network says now and then."""
  root = tmp_path_factory.mktemp("c")
  said = labels_said(variables, root / "probe")
  for number, (name, severity) in enumerate(SETTINGS):
    rng = np.random.default_rng(number)
    fill(root / f"imagenet-c/{name}/{severity}", rng.choice(said, IMAGES), number)
  fill(root / "val", np.random.default_rng(99).choice(said, 40), 99)
  return root


def test_mce_of_a_folder(network, variables, corrupted, tmp_path):
  """Fails where a set is another's, an error is not divided by AlexNet's, or the clean error is
  forgotten: against ten lines of numpy."""
  network.data.dir = str(corrupted)
  network.eval.benchmarks = "imagenet_c,clean"
  summary = evaluate(network, str(tmp_path / "out"))
  error = {}
  for name, severity in SETTINGS:
    logits, labels = logits_of(variables, corrupted / f"imagenet-c/{name}/{severity}")
    error[name, severity] = np.mean(logits.argmax(1) != labels)
  means = {name: np.mean([error[name, severity] for severity in range(1, 6)]) for name in ALEXNET}
  expected = 100 * np.mean([means[name] / ALEXNET[name] for name in ALEXNET])
  logits, labels = logits_of(variables, corrupted / "val")
  clean = np.mean(logits.argmax(1) != labels)
  relative = 100 * np.mean([(means[name] - clean) / (ALEXNET[name] - 0.4348) for name in ALEXNET])

  detail = summary["details"]["imagenet_c"]
  assert np.std(list(error.values())) > 0.02, "sets could not be told apart"
  assert detail["mce"] == pytest.approx(expected, abs=1e-9)
  assert detail["relative_mce"] == pytest.approx(relative, abs=1e-6)
  assert detail["missing"] == []
  assert detail["images"] == IMAGES
  for (name, severity), value in error.items():
    assert detail["errors"][name][severity] == pytest.approx(value, abs=1e-12)
  row = summary["results"]["imagenet_c"]
  assert row["images"] == 75 * IMAGES
  assert row["top1"] == pytest.approx(1 - np.mean(list(error.values())))
  written = json.loads((tmp_path / "out/evaluation.json").read_text())
  assert written["details"]["imagenet_c"]["mce"] == detail["mce"]
  lines = (tmp_path / "out/evaluation.csv").read_text().splitlines()
  assert len(lines) == 1 + 2 + 75
  assert any(line.startswith("imagenet_c,fog/3,") for line in lines)


def test_an_incomplete_imagenet_c(network, variables, corrupted, tmp_path, capsys):
  """Fails where an mCE is made up of what is there, or the rest is not shown."""
  root = tmp_path / "data"
  root.mkdir()
  (root / "val").symlink_to(corrupted / "val")
  for name, severity in SETTINGS:
    if (name, severity) != ("fog", 3) and name != "snow":
      (root / "blur" / name).mkdir(parents=True, exist_ok=True)      # as in the tars
      (root / "blur" / name / str(severity)).symlink_to(
          corrupted / f"imagenet-c/{name}/{severity}")
  (root / "blur/snow/2").mkdir(parents=True)                                # without images
  network.eval.benchmarks = "imagenet_c"
  detail = evaluate(network, str(tmp_path / "out"))["details"]["imagenet_c"]
  assert "snow/2: " in detail["note"]
  assert detail["mce"] is None
  assert detail["relative_mce"] is None
  assert detail["missing"] == [f"snow/{severity}" for severity in range(1, 6)] + ["fog/3"]
  assert set(detail["errors"]["fog"]) == {1, 2, 4, 5}
  said = capsys.readouterr().out
  assert "no mCE without snow/1" in said
  assert "fog/3" in said


@pytest.mark.parametrize(("name", "folder", "classes"), [
    ("imagenet_a", "imagenet-a", CLASSES_OF_A), ("imagenet_r", "imagenet-r", CLASSES_OF_R),
    ("imagenet_sketch", "sketch", range(1000)), ("stylized_imagenet", "stylized-imagenet/val",
                                                 range(1000))])
def test_only_the_logits_of_the_sets_classes_count(network, variables, tmp_path, name, folder,
                                                   classes):
  """Fails where the arg-max, or the loss, is over other classes than the set has images of."""
  classes = np.array(list(classes))
  place = tmp_path / "elsewhere" / folder
  fill(place, np.random.default_rng(5).choice(classes, 30), 5)
  rng = np.random.default_rng(50)
  images = to_model_units(np.stack([picture(rng) for _ in range(10)]))
  logits = np.asarray(models.create_model("one_block", 1000).apply(variables, images))
  fill(place, classes[logits[:, classes].argmax(1)], 50)                    # these it gets right
  logits, labels = logits_of(variables, place)
  kept = logits[:, classes]
  network.eval.dir = str(tmp_path / "elsewhere")
  network.eval.benchmarks = name
  row = evaluate(network, str(tmp_path / "out"))["results"][name]
  right = classes[kept.argmax(1)] == labels
  among = (classes[np.argsort(-kept)[:, :5]] == labels[:, None]).any(1)
  assert row["images"] == len(labels)
  assert row["top1"] == pytest.approx(right.mean())
  assert row["top5"] == pytest.approx(among.mean())
  own = kept[np.arange(len(labels)), np.searchsorted(classes, labels)]
  shifted = kept - kept.max(1, keepdims=True)
  loss = np.log(np.exp(shifted).sum(1)) + kept.max(1) - own
  assert row["loss"] == pytest.approx(loss.mean(), rel=1e-4)
  if len(classes) < 1000:
    assert right.mean() != np.mean(logits.argmax(1) == labels), "the subset makes no difference"


def test_what_is_missing_is_skipped(network, tmp_path, capsys):
  """Fails where one set that is not there ends the evaluation of the others, or says nothing."""
  fill(tmp_path / "data/val", SOME, 1)
  network.eval.benchmarks = "imagenet_r,clean,imagenet_c,auxiliary,transfer"
  summary = evaluate(network, str(tmp_path / "out"))
  assert list(summary["results"]) == ["clean"]
  assert set(summary["skipped"]) == {"imagenet_r", "imagenet_c", "auxiliary", "transfer"}
  said = capsys.readouterr().out
  assert "skipped: imagenet_r:" in said
  assert "'imagenet-r'" in said
  network.eval.benchmarks = "imagenet_r,imagenet_sketch"
  with pytest.raises(InputError, match=r"none of them can be measured .*imagenet-r.*sketch"):
    evaluate(network, str(tmp_path / "out"))


def test_images_of_other_classes_than_the_set_has(network, tmp_path):
  """Fails where ImageNet itself, given for ImageNet-A, is measured on 200 logits without a word."""
  fill(tmp_path / "data/imagenet-a", [next(i for i in range(1000) if i not in CLASSES_OF_A)], 1)
  fill(tmp_path / "data/sketch", SOME, 1)
  network.eval.benchmarks = "imagenet_a,imagenet_sketch"
  summary = evaluate(network, str(tmp_path / "out"))
  assert list(summary["results"]) == ["imagenet_sketch"]                    # it goes on
  assert "imagenet-a: 1 of its 1 images are of classes" in summary["skipped"]["imagenet_a"]
  network.eval.benchmarks = "imagenet_a"
  with pytest.raises(InputError, match="of classes that the set should not have"):
    evaluate(network, str(tmp_path / "out"))


def test_published_numbers_stand_beside_their_own_images_alone():
  """Fails where the top-1 of clean validation images is put beside that of others."""
  summary = {"network": "efficientnet_b0", "scheme": None, "step": 0, "imagenet": True,
             "weights": "timm/tf_efficientnet_b0.ap_in1k", "imagenet_validation": True}
  assert published.of(summary)["clean"] == "77.6"
  assert published.of(summary)["imagenet_a"] == "5.307"
  fog = {**summary, "imagenet_validation": False}
  assert "clean" not in published.of(fog)
  assert published.of(fog)["imagenet_r"] == "40.397"
  assert published.of({**summary, "scheme": "vanilla", "weights": "moving averages"})[
      "clean"] == "77.1"
  assert published.of({**summary, "weights": "somebody's.safetensors"}) == {}
  assert published.of({**summary, "imagenet": False}) == {}


def test_a_network_of_other_classes(run, published, tmp_path):
  """Fails where ten logits are compared with ImageNet's labels, or 1000 with those of clothes."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.eval.benchmarks, config.eval.dir = "clean,imagenet_a,imagenet_c", str(tmp_path)
  fill(tmp_path / "imagenet-a", SOME, 1)
  summary = evaluate(config, workdir)
  assert list(summary["results"]) == ["clean"]
  assert "1000 classes" in summary["skipped"]["imagenet_a"]
  clothes = make_config({"model.pretrained": published(1000), "model.input_convention": "inception",
                         "eval.benchmarks": "clean,imagenet_a", "eval.dir": str(tmp_path)})
  summary = evaluate(clothes, str(tmp_path / "clothes"))
  assert list(summary["results"]) == ["imagenet_a"]
  assert "its classes are not those of the weights" in summary["skipped"]["clean"]


def test_sets_of_tfds(network, monkeypatch, tmp_path):
  """Fails where data prepared by TFDS is not looked for under its name and split."""
  asked = []
  (tmp_path / "data/imagenet_v2/matched-frequency").mkdir(parents=True)
  (tmp_path / "data/imagenet2012_corrupted/fog_3").mkdir(parents=True)

  def open_source(*arguments):
    asked.append(arguments)
    raise InputError("seen")

  from advprop_jax.benchmarks import imagenet_c
  for module in (imagenet_sets, imagenet_c):
    monkeypatch.setattr(module, "open_source", open_source)
  network.eval.benchmarks = "imagenet_v2,imagenet_c"
  with pytest.raises(InputError, match="seen"):
    evaluate(network, str(tmp_path / "out"))
  data = str(tmp_path / "data")
  assert asked == [("imagenet2012_corrupted/fog_3", data, "validation"),
                   ("imagenet_v2/matched-frequency", data, "test")]
