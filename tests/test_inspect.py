"""The picture holds what the first step will see, and the table says what was measured."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFont

from advprop_jax import inspect
from advprop_jax.errors import InputError
from advprop_jax.experiment import create_experiment, initial_state
from advprop_jax.figures import sheet
from advprop_jax.method.schemes import SCHEMES, SECOND_VIEW
from advprop_jax.train import open_batches
from tests.small_run import make_config

FINE = {"scheme": "fine_grained", "data.second_augment": "autoaugment"}
FAST = {"scheme": "fast_advprop", "attack.statistics": "batch", "attack.dropout": True,
        "data.batch_size": 40}


def first(changes):
  """(experiment, first batch, {name of a part: (pixels, labels)})."""
  experiment = create_experiment(make_config(changes))
  batches = open_batches(experiment)
  batch = next(batches)
  batches.close()
  parts = inspect.first_parts(experiment, initial_state(experiment)[0], batch)
  return experiment, batch, {part.name: shown for part, shown in parts.items()}


def test_the_parts_are_those_of_the_first_batch():
  """Fails where a row shows another view, or an attack leaves its ball or does nothing."""
  _, batch, parts = first({**FINE, "attack.epsilon": 8.0, "attack.step_size": 8.0})
  assert list(parts) == ["clean", "autoaugment", "adversarial"]
  np.testing.assert_allclose(parts["clean"][0], batch["image"][:8], atol=1e-3)
  np.testing.assert_allclose(parts["autoaugment"][0], batch[SECOND_VIEW][:8], atol=1e-3)
  change = np.abs(parts["adversarial"][0] - parts["clean"][0])
  assert 4 < change.max() <= 8 + 1e-3
  for _, labels in parts.values():
    np.testing.assert_array_equal(labels, batch["label"][:8])


def test_parts_that_share_a_batch_have_their_own_images():
  """Fails where Fast AdvProp's adversarial row has fewer columns, or the clean one's images."""
  _, batch, parts = first(FAST)
  np.testing.assert_allclose(parts["clean"][0], batch["image"][[0, 1, 2, 3, 5, 6, 7, 8]], atol=1e-3)
  assert parts["adversarial"][0].shape == (8, 28, 28, 3)
  np.testing.assert_array_equal(parts["adversarial"][1], batch["label"][4::5])


def test_an_attack_that_grows_is_shown_in_full():
  """Fails where a ramp, at its start, leaves nothing to see."""
  _, _, parts = first({"attack.ramp_epochs": 1.0, "attack.epsilon": 8.0, "attack.step_size": 8.0})
  assert np.abs(parts["adversarial"][0] - parts["clean"][0]).max() > 4


def test_a_batch_smaller_than_a_row():
  _, _, parts = first({"data.batch_size": 3})
  assert [len(pixels) for pixels, _ in parts.values()] == [3, 3]


def test_the_verb(tmp_path, monkeypatch, capsys):
  """Fails where the picture, the table or a number is missing, or the workdir is taken as a run."""
  monkeypatch.setattr(inspect, "SECONDS", 0.2)
  result = inspect.inspect(make_config(FINE), str(tmp_path / "new"))
  assert [path.name for path in (tmp_path / "new").iterdir()] == [inspect.FILE]
  with Image.open(tmp_path / "new" / inspect.FILE) as picture:
    width, height = picture.size
  assert width > 8 * sheet.CELL
  assert 4 * (sheet.CELL + sheet.TEXT) < height < 6 * (sheet.CELL + sheet.TEXT)
  assert result["records"] == [40, 12]
  assert result["images_per_second"] > 10
  assert 0.2 <= result["seconds"] < 5
  said = capsys.readouterr().out
  for text in ("40 train, 12 test", "28 px", "crop_flip; second view: autoaugment", "of each core"):
    assert text in said


def test_speed_leaves_out_what_was_ready():
  """Fails where batches that were read ahead are counted as if they had been made in no time."""
  class Clock:
    time, taken = 0.0, 0

  def batches():
    while True:
      Clock.taken += 1
      Clock.time += 0.0 if Clock.taken <= 5 else 0.1
      yield {"label": np.zeros(20)}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inspect.time, "perf_counter", lambda: Clock.time)
    speed, seconds = inspect.measure(batches(), 5, 1.0)
  np.testing.assert_allclose([speed, seconds], [200, 1], rtol=0.2)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_captions_fit_beside_their_rows(scheme):
  """Fails where a row's name runs into the first image, or into the next row."""
  experiment = create_experiment(make_config({
      "attack.name": "pgd", "attack.norm": "l2", "attack.epsilon": 127.5, "attack.target": "random",
      "attack.num_steps": 100}))
  attack = dataclasses.replace(experiment.method.attack, statistics="batch")
  experiment = dataclasses.replace(
      experiment, method=dataclasses.replace(experiment.method, attack=attack))
  font = ImageFont.load_default(sheet.TEXT)
  for part in SCHEMES[scheme].parts:
    lines = inspect._caption(experiment, part).splitlines()
    assert max(map(font.getlength, lines)) <= 112
    assert len(lines) * (sheet.TEXT + 4) <= sheet.CELL + sheet.TEXT + 5 + sheet.GAP


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="workdir"):
    inspect.inspect(make_config(), str(tmp_path / "file" / "run"))
