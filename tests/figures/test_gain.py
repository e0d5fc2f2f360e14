"""Who is compared with whom, and by how much."""

import math

import pytest

from advprop_jax.figures import gain, runs
from tests.figures.test_runs import read, row, workdir


def groups(tmp_path, *settings):
  paths = [workdir(tmp_path / str(place), **each) for place, each in enumerate(settings)]
  return runs.groups_of(read(*paths))


def test_pairs_of_one_seed(tmp_path):
  """Fails where the spread between seeds counts, though both of a pair share it."""
  made = groups(tmp_path, {"seed": 0, "clean": 0.80}, {"seed": 1, "clean": 0.60},
                {"seed": 7, "clean": 0.10}, {"scheme": "vanilla", "seed": 0, "clean": 0.78},
                {"scheme": "vanilla", "seed": 1, "clean": 0.56})
  (found,) = gain.gains(made, "clean")
  assert found.points == pytest.approx(3)         # of 2 and 4; seed 7 has no partner
  assert found.error == pytest.approx(1)
  assert found.seeds == 2
  assert (found.group.scheme, found.baseline.scheme) == ("advprop", "vanilla")


def test_single_runs(tmp_path):
  """Fails where a difference of two numbers has the error of one, or none."""
  made = groups(tmp_path, {"clean": 0.8}, {"scheme": "vanilla", "clean": 0.9})
  (found,) = gain.gains(made, "clean")
  assert found.points == pytest.approx(-10)
  assert found.error == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 100 + 0.9 * 0.1 / 100))
  assert found.seeds == 0
  section = gain.section(made)
  assert [panel.name for panel in section.panels] == ["gain_clean"]
  assert "one network" in " ".join(section.captions)
  assert "corruptions" in section.captions[-1]


def test_unlike_measurements_do_not_pair(tmp_path):
  """Fails where 200 corrupted images of one are compared with 2,000 of the other."""
  made = groups(tmp_path, {"results": {"corruptions": row(0.5, images=200)}},
                {"scheme": "vanilla", "results": {"corruptions": row(0.5, images=2000)}})
  assert gain.gains(made, "corruptions") == []


def test_a_network_whose_size_is_not_known(tmp_path):
  """Fails where one file that is missing takes the whole report with it."""
  made = groups(tmp_path, {}, {"scheme": "vanilla"})
  (tmp_path / "0" / "classes.json").unlink()
  assert "classes.json is missing" in gain.section(made).reason


def test_only_the_same_network_and_images_pair(tmp_path):
  """Fails where AdvProp of one network is compared with vanilla of another, or on other images."""
  made = groups(tmp_path, {}, {"scheme": "vanilla", "changes": {"model.name": "resnet_tiny"}},
                {"scheme": "vanilla", "seed": 1, "data": "bundled, train"})
  assert gain.gains(made, "clean") == []
  assert "--config.scheme=vanilla" in gain.section(made).reason


def test_the_nearest_baseline(tmp_path):
  """Fails where a longer vanilla run is the baseline though one of the same length is there."""
  made = groups(tmp_path, {"clean": 0.8},
                {"scheme": "vanilla", "clean": 0.1, "changes": {"train.steps": 50}},
                {"scheme": "vanilla", "clean": 0.7})
  (found,) = gain.gains(made, "clean")
  assert found.points == pytest.approx(10)


def test_several_networks_and_corrupted_images(tmp_path):
  """Fails where sizes are wrong, or the gain on corrupted images is left out."""
  settings = []
  for name in ("efficientnet_tiny", "resnet_tiny"):
    for scheme in ("advprop", "vanilla"):
      settings.append({"scheme": scheme, "changes": {"model.name": name},
                       "results": {"corruptions": row(0.5 if scheme == "advprop" else 0.4)}})
  made = groups(tmp_path, *settings)
  found = gain.gains(made, "corruptions")
  assert [each.points for each in found] == [pytest.approx(10)] * 2
  assert found[0].millions == pytest.approx(0.256, abs=0.01)
  assert found[0].millions != found[1].millions
  assert len(gain.section(made).panels) == 2
