"""APGD-CE against the code of its authors, and one that was made after it, in PyTorch."""

import contextlib
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.method.apgd import random_start
from tests.method.test_apgd import all_in_float64, case, losses_of, network, trajectory, weights


def authors_result(package, predict, images, labels, noise, epsilon, num_steps, norm):
  """Points visited, the result as `apgd` defines it, and how many images stay robust.

  Args:
    package: "pyautoattack" or "torchattacks".
    predict: torch, (n, 3, h, w) in [0, 1] -> logits.
    images: torch, (n, 3, h, w) in [0, 1].
    labels: torch.
    noise: torch, as images: what their random numbers are to be, "linf" in [-1, 1].
    epsilon: of pixels in [0, 1].
    num_steps: theirs.
    norm: ours.
  """
  import torch

  points, norm = [], {"linf": "Linf", "l2": "L2"}[norm]

  class Model(torch.nn.Module):
    def forward(self, x):
      points.append(x.detach().numpy().transpose(0, 2, 3, 1).copy())
      return predict(x)

  if package == "pyautoattack":
    attack = importlib.import_module("pyautoattack.autopgd_base").APGDAttack(
        Model(), n_iter=num_steps, norm=norm, eps=epsilon, device="cpu")
    attack.init_hyperparam(images)
  else:
    attack = importlib.import_module("torchattacks").APGD(
        Model().eval(), norm=norm, eps=epsilon, steps=num_steps)

  def drawn(draw, mask):
    def same_noise(*_, **__):
      return (noise[mask] + 1) / 2 if draw == "rand" else noise[mask]
    return same_noise

  draw = "rand" if norm == "Linf" else "randn"
  right = predict(images).argmax(1) == labels
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.Tensor, "float", lambda x: x.to(torch.get_default_dtype()))
    patch.setattr(torch, draw, drawn(draw, torch.ones(len(images), dtype=bool)))
    best, robust, _, fooled = attack.attack_single_run(images, labels)
    visited = np.stack(points[:num_steps + 1])
    patch.setattr(torch, draw, drawn(draw, right))
    adversarial = attack.perturb(images, labels)
  adversarial = adversarial[1] if package == "torchattacks" else adversarial
  result = torch.where(robust.bool()[:, None, None, None], best, fooled)
  result = torch.where(right[:, None, None, None], result, images)
  return (visited, result.detach().numpy().transpose(0, 2, 3, 1),
          int((predict(adversarial).argmax(1) == labels).sum()))


@pytest.mark.slow
@pytest.mark.parametrize(("package", "dtype"), [
    ("pyautoattack", "float64"), ("torchattacks", "float64"), ("pyautoattack", "float32")])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 2.0), ("linf", 8.0), ("l2", 30.0)])
@pytest.mark.parametrize("num_steps", [20, 100])
def test_the_authors_code_does_the_same(package, dtype, norm, epsilon, num_steps):
  """pyautoattack 0.2.0, the authors' repository as a package, and torchattacks 3.5.1, on PyTorch.

  The same network, the same start. In float32 the sign of a gradient or a rise of nearly 0 is
  rounding; there the points of an image may part, and its result is as good, not the same.

  Needs torch, and one of the packages, installed without what they ask for; torchattacks imports
  torchvision and requests.
  """
  torch = pytest.importorskip("torch")
  pytest.importorskip("pyautoattack.autopgd_base" if package == "pyautoattack" else package)
  images, labels, keys = case(400, right=False)
  start = random_start(images, keys, epsilon, norm)
  noise = jax.vmap(lambda key: (
      jax.random.uniform(key, images.shape[1:], jnp.float32, -1, 1) if norm == "linf"
      else jax.random.normal(key, images.shape[1:])))(keys)

  def as_torch(x):
    return torch.from_numpy(np.asarray(x, dtype).transpose(0, 3, 1, 2).copy())

  def predict(x):
    pixels = (2 * x - 1).permute(0, 2, 3, 1).reshape(len(x), -1)
    w1, b1, w2 = (torch.from_numpy(w).to(x.dtype) for w in weights())
    return torch.tanh(pixels @ w1 + b1) @ w2

  try:
    torch.set_default_dtype(getattr(torch, dtype))
    visited, theirs, robust = authors_result(
        package, predict, (as_torch(images) + 1) / 2, torch.from_numpy(np.int64(labels)),
        as_torch(noise), epsilon / 255, num_steps, norm)
  finally:
    torch.set_default_dtype(torch.float32)
  with all_in_float64() if dtype == "float64" else contextlib.nullcontext():
    points, ours = trajectory(jnp.asarray(start, dtype), labels=labels, epsilon=epsilon,
                              images=jnp.asarray(images, dtype), num_steps=num_steps, norm=norm)
  same_path = np.abs(points - (2 * visited - 1)).max((0, 2, 3, 4)) < 1e-4
  same = np.abs(ours - (2 * theirs - 1)).max((1, 2, 3)) < 1e-4
  ours_robust = np.sum(np.argmax(network(ours), axis=-1) == labels)
  loss, their_loss = (losses_of(x, labels).mean() for x in (ours, 2 * theirs - 1))
  print(f"{package}, {dtype}, {norm} {epsilon:g}, {num_steps} steps: same path "
        f"{same_path.mean():.4f}, same result {same.mean():.4f}; robust {ours_robust}, theirs "
        f"{robust}, of 400; loss {loss:.4f}, {their_loss:.4f}")
  assert min(same.mean(), same_path.mean()) >= (0.98 if dtype == "float64" else 0.6)
  assert abs(ours_robust - robust) <= 1
  assert abs(loss - their_loss) < 0.01 * their_loss
