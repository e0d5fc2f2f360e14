"""From weights trained on ImageNet to a network of other classes, on real photographs."""

import pathlib

import foolbox
import jax
import numpy as np
import pytest

from advprop_jax import trained
from advprop_jax.export import export
from advprop_jax.predict import classifier, find_files, predict, read_images
from advprop_jax.train import train
from configs import finetune
from tests.models.test_published import weights_file

LITE = "efficientnet_lite0"
CLASSES = 8


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
  """(config, workdir, folder of photographs) of three steps of AdvProp on twenty photographs."""
  root = tmp_path_factory.mktemp("finetune")
  for number, path in enumerate(sorted(pathlib.Path(foolbox.__file__).parent.glob(
      "data/imagenet_*.jpg"))):
    for split in ("train", "test"):
      folder = root / "data" / split / f"class_{number % CLASSES}"
      folder.mkdir(parents=True, exist_ok=True)
      (folder / path.name).write_bytes(path.read_bytes())
  config = finetune.get_config("lite0")
  config.model.pretrained = str(weights_file(LITE))
  config.data.dir = str(root / "data")
  config.data.image_size, config.data.batch_size, config.eval.batch_size = 128, 10, 10
  config.optimizer.warmup_epochs, config.train.steps = 0.0, 3
  train(config, str(root / "run"))
  config.eval.photographs = str(root / "data" / "test")
  return config, str(root / "run"), root / "data" / "test"


@pytest.mark.slow
def test_every_format_gives_the_top_five_of_the_checkpoint(fine_tuned, tmp_path):
  """Fails where an export is of other weights, or normalises or crops in another way."""
  config, workdir, photographs = fine_tuned
  network = trained.read_run(workdir)
  assert (network.num_classes, network.convention) == (CLASSES, "lite")
  top5 = {path: [answer["label"] for answer in answers]
          for path, answers in predict(config, workdir)["photographs"].items()}
  assert len(top5) == 20
  pixels, _ = read_images(photographs, find_files(photographs), network)

  def same(logits):
    return dict(zip(pixels, np.argsort(-logits, axis=1)[:, :5].tolist(), strict=True)) == top5

  batch = np.stack(list(pixels.values()))
  expected = classifier(network)(batch)
  for kind in ("timm", "stablehlo", "checkpoint"):
    config.export.format, config.export.dir = kind, str(tmp_path / kind)
    export(config, workdir)
  stablehlo = jax.export.deserialize((tmp_path / "stablehlo/model.stablehlo").read_bytes())
  assert same(np.asarray(jax.jit(stablehlo.call)(batch)))
  for kind in ("timm", "checkpoint"):
    assert same(classifier(trained.read(str(tmp_path / kind), LITE))(batch))
  timm = pytest.importorskip("timm", reason="needs torch and timm: pip install torch timm")
  import torch
  theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
  images = torch.from_numpy((np.float32(batch.transpose(0, 3, 1, 2)) - 127) / 128)
  with torch.no_grad():
    logits = theirs(images).numpy()
  print(f"largest logit {np.abs(expected).max():.2f}, "
        f"largest error of timm {np.abs(logits - expected).max():.1e}")
  assert same(logits)
  assert np.abs(logits - expected).max() < 1e-4
