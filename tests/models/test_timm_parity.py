"""Every published network against timm itself; needs torch and timm, which are no requirement."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax import trained
from advprop_jax.export import write_timm
from advprop_jax.models import NAMES, create_model
from advprop_jax.models.weights import from_state_dict, timm_name, to_timm
from advprop_jax.predict import classifier
from tests.models.test_published import weights_file

pytestmark = pytest.mark.slow

PUBLISHED = [name for name in NAMES if not name.endswith("tiny")]
SIZE = 97  # odd, so that 'SAME' pads differently from layer to layer
# Of the largest logit. PyTorch's own float32 is 2.2e-3 from its float64 in ResNet-200.
TOLERANCE = {"resnet200": 5e-3}


@pytest.fixture(scope="module")
def timm():
  pytest.importorskip("torch", reason="needs torch and timm: pip install torch timm")
  return pytest.importorskip("timm", reason="needs torch and timm: pip install torch timm")


def make_reference(timm, name):
  """timm's network in float64, with random weights that keep activations near one."""
  import torch
  prefix = "tf_" if name.startswith("efficientnet") else ""  # as TensorFlow pads, not PyTorch
  model = timm.create_model(prefix + name, pretrained=False, drop_rate=0.0, drop_path_rate=0.0)
  rng = np.random.default_rng(0)

  def value(key, shape):
    if key.endswith(("running_mean", "bias")):
      return rng.normal(0.0, 0.1, shape)
    if key.endswith("running_var") or len(shape) == 1:
      return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0.0, np.sqrt(2 / np.prod(shape[1:])), shape)

  weights = {key: value(key, tuple(tensor.shape)).astype(np.float32)
             for key, tensor in model.state_dict().items()
             if not key.endswith("num_batches_tracked")}
  model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, strict=False)
  for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.momentum = 1.0
  return model.double(), weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_names_are_timms(name, timm):
  """Batch statistics, then the running statistics of that pass.

  Running statistics that no pass has made are no test: B4 and larger then amplify float32's
  rounding, PyTorch's too, into the first digits.
  """
  import torch
  reference, weights = make_reference(timm, name)
  images = np.random.default_rng(1).uniform(-1, 1, (4, SIZE, SIZE, 3)).astype(np.float32)
  pixels = torch.tensor(images).double().permute(0, 3, 1, 2)
  model = create_model(name, dropout_rate=0.0, drop_path_rate=0.0)
  apply = jax.jit(model.apply, static_argnames="train")

  def assert_agree(train, state_dict):
    with torch.no_grad():
      expected = reference.train(train)(pixels).numpy()
    logits = apply(from_state_dict(name, state_dict), jnp.asarray(images), train=train)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE.get(name, 1e-3)

  assert_agree(True, weights)
  measured = {key: tensor.numpy().astype(np.float32)
              for key, tensor in reference.state_dict().items()
              if not key.endswith("num_batches_tracked")}
  assert_agree(False, measured)

  written = to_timm(name, from_state_dict(name, measured))
  assert written.keys() == measured.keys()
  reference.load_state_dict({key: torch.tensor(value) for key, value in written.items()},
                            strict=False)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_b0", "resnet50"])
def test_an_export_is_timms(name, timm, tmp_path):
  """Exported from here, loaded by timm both ways that the card and the hub's users know.

  Fails where a tensor, the classes or the preprocessing get lost on the way. The weights are those
  of a Lite network trained on ImageNet, and random ones of timm's.
  """
  import safetensors.torch
  import torch
  pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
  if name == "efficientnet_lite0":
    network = trained.read(str(weights_file(name)), name)
  else:
    _, weights = make_reference(timm, name)
    reference = timm.create_model(timm_name(name))
    reference.load_state_dict(
        {key: torch.tensor(value) for key, value in weights.items()}, strict=False)
    with torch.no_grad():  # the running statistics of these images, as above
      for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
          module.momentum = 1.0
      mean, std = reference.default_cfg["mean"], reference.default_cfg["std"]
      reference.train()(torch.tensor(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float())
    torch.save(reference.state_dict(), tmp_path / "in.pth")
    (tmp_path / "config.json").write_text(json.dumps(reference.default_cfg, default=str))
    network = trained.read(str(tmp_path / "in.pth"), name)
  folder = tmp_path / "out"
  folder.mkdir()
  write_timm(network, folder)

  ours = classifier(network)(pixels)
  by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
  by_name = timm.create_model(timm_name(name), num_classes=1000).eval()
  by_name.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
  settings = timm.data.resolve_model_data_config(by_folder)
  mean, std = (np.array(settings[key], np.float32) for key in ("mean", "std"))
  images = torch.tensor(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
  with torch.no_grad():
    for theirs in (by_folder(images), by_name(images)):
      error = np.abs(ours - theirs.numpy()).max()
      print(f"{name}: largest logit {np.abs(ours).max():.2f}, largest error {error:.1e}")
      assert error < 1e-4 * max(1, np.abs(ours).max())
  assert by_folder.pretrained_cfg["label_names"][0] == "n01440764"
  assert tuple(settings["input_size"]) == (3, 224, 224)
  assert settings["crop_pct"] == pytest.approx(network.crop_fraction, abs=1e-4)
  assert settings["interpolation"] == "bicubic"
