"""Every published network against timm itself; needs torch and timm, which are no requirement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.models import NAMES, create_model
from advprop_jax.models.weights import from_state_dict, to_timm

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
