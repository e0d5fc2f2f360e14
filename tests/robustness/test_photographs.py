"""EfficientNet-Lite0, trained on ImageNet by others, on twenty corrupted photographs.

  python -m pytest -m slow -s tests/robustness/test_photographs.py
"""

import json
import pathlib

import foolbox
import pytest

from advprop_jax.benchmarks import mce
from advprop_jax.data.imagenet import WNIDS
from advprop_jax.evaluate import evaluate
from configs import robustness
from tests.models.test_published import weights_file


def class_folders(folder):
  """The photographs of foolbox as ImageNet's val/."""
  for path in (pathlib.Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"):
    place = folder / "val" / WNIDS[int(path.stem.split("_")[-1])]
    place.mkdir(parents=True, exist_ok=True)
    (place / path.name).write_bytes(path.read_bytes())
  return folder


def make_config(folder):
  config = robustness.get_config("lite0,in_memory")
  config.model.pretrained = str(weights_file("efficientnet_lite0"))
  config.data.dir = str(class_folders(folder))
  config.eval.batch_size = 20
  return config


@pytest.mark.slow
def test_corrupted_photographs_twice(tmp_path):
  """Fails where numbers do not repeat, or corruptions do not hurt in the order of severities."""
  config = make_config(tmp_path / "data")
  config.eval.benchmarks = "clean,corruptions"
  first = evaluate(config, str(tmp_path / "first"))
  config.eval.num_workers = 0
  again = evaluate(config, str(tmp_path / "again"))
  assert first["results"] == again["results"]
  assert first["details"] == again["details"]
  assert json.loads((tmp_path / "first/evaluation.json").read_text())["details"]
  assert first["results"]["clean"]["top1"] >= 0.9
  errors = first["details"]["corruptions"]["errors"]
  by_severity = [sum(errors[name][severity] for name in mce.CORRUPTIONS)
                 for severity in mce.SEVERITIES]
  assert by_severity == sorted(by_severity)
  assert first["details"]["corruptions"]["mce"] is None
  assert "not comparable" in first["details"]["corruptions"]["note"]
