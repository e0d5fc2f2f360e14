"""The numbers that reach the bars and lines are those of the files."""

import math

import pytest

from advprop_jax.figures import robustness, runs
from tests.figures.test_runs import ATTACK, read, row, workdir

NAMES = [name for names in robustness.KINDS.values() for name in names]


def corruptions(shift=0.0, names=NAMES, severities=5, **more):
  """Details in which corruption c has at severity s the error shift + c / 100 + s / 10."""
  errors = {name: {str(s): shift + NAMES.index(name) / 100 + s / 10
                   for s in range(1, severities + 1)} for name in names}
  return {"errors": errors, "mean_error": shift + 0.37, "standard_error": 0.004, "mce": None,
          "relative_mce": None, "images": 12, "note": "", "missing": [], **more}


def groups(tmp_path, *settings):
  paths = [workdir(tmp_path / str(place), **each) for place, each in enumerate(settings)]
  return runs.groups_of(read(*paths))


def test_bars_are_means_over_severities_and_seeds(tmp_path):
  """Fails where errors are drawn as accuracies, or an error bar is that of another spread."""
  (group,) = groups(tmp_path, {"seed": 0, "details": {"corruptions": corruptions()}},
                    {"seed": 1, "details": {"corruptions": corruptions(0.02)}})
  found = robustness.corrupted(group, "corruptions")
  assert list(found.means) == NAMES
  assert len(NAMES) == 15
  # The error of fog, number 9, is 0.09 + 0.3 in the mean of severities, and 0.02 more with seed 1.
  mean, error = found.means["fog"]
  assert (mean, error) == (pytest.approx(1 - 0.40), pytest.approx(0.01))
  assert found.severities["fog"]["5"] == pytest.approx(1 - 0.60)
  assert found.mean == (pytest.approx(1 - 0.38), pytest.approx(0.01))
  assert (found.runs, found.images) == (2, 12)


def test_one_run_has_the_error_over_its_images(tmp_path):
  """Fails where a single run claims to know how seeds differ."""
  (group,) = groups(tmp_path, {"details": {"imagenet_c": corruptions()}})
  found = robustness.corrupted(group, "imagenet_c")
  assert found.mean == (pytest.approx(0.63), 0.004)
  assert found.means["snow"][1] is None
  assert robustness.corrupted(group, "corruptions") is None


def test_a_corruption_without_all_severities_has_no_mean(tmp_path):
  """Fails where a mean over three severities stands beside means over five."""
  details = corruptions(names=NAMES[:4], severities=3)
  details["errors"]["fog"] = {str(s): 0.5 for s in range(1, 6)}
  (group,) = groups(tmp_path, {"details": {"imagenet_c": details}})
  found = robustness.corrupted(group, "imagenet_c")
  assert list(found.means) == ["fog"]
  assert list(found.severities["shot_noise"]) == ["1", "2", "3"]
  (section, _) = robustness.sections([group])
  assert [panel.name for panel in section.panels] == ["imagenet_c_weather", "imagenet_c_mean"]


def strengths(tops, **more):
  return {"points": [{"epsilon": epsilon, **row(top1)} for epsilon, top1 in tops.items()],
          "attack": {**ATTACK, **more}}


def test_lines_by_strength(tmp_path):
  """Fails where seeds are averaged at epsilons that not all of them have, or in another order."""
  (group,) = groups(tmp_path, {"seed": 0, "details": {"strength": strengths({4: 0.2, 1: 0.6})}},
                    {"seed": 1, "details": {"strength": strengths({1: 0.7, 2: 0.5, 4: 0.3})}},
                    {"seed": 2})
  found = robustness.strength(group)
  assert (found.epsilons, found.runs, found.images) == ([1, 4], 2, 100)
  assert found.estimates == [(pytest.approx(0.65), pytest.approx(0.05)),
                             (pytest.approx(0.25), pytest.approx(0.05))]


def test_seeds_that_were_attacked_otherwise(tmp_path):
  """Fails where runs under attacks of more steps are averaged with others."""
  (group,) = groups(tmp_path, {"seed": 0, "details": {"strength": strengths({1: 0.5})}},
                    {"seed": 1, "details": {"strength": strengths({1: 0.1}, num_steps=9)}})
  assert robustness.strength(group).estimates[0][0] == 0.5
  assert "1 of the 2 runs of AdvProp" in robustness.sections([group])[-1].captions[0]


def test_one_run_by_strength(tmp_path):
  """Fails where the error bars of a single run are lost."""
  (group,) = groups(tmp_path, {"details": {"strength": strengths({1: 0.5})}})
  assert robustness.strength(group).estimates == [(0.5, pytest.approx(math.sqrt(0.25 / 100)))]


def test_unequal_attacks_are_said(tmp_path):
  """Fails where networks that were attacked differently stand side by side without a word."""
  made = groups(tmp_path, {"details": {"strength": strengths({1: 0.5})}},
                {"scheme": "vanilla", "details": {"strength": strengths({1: 0.4}, num_steps=9)}})
  *_, section = robustness.sections(made)
  assert "do not compare" in section.captions[0]
  assert "PGD-9" in section.captions[0]
  *_, section = robustness.sections(made[:1])
  assert "do not compare" not in section.captions[0]


def test_what_is_missing_names_its_command(tmp_path):
  """Fails where a figure is left out without a way to get it."""
  for section in robustness.sections(groups(tmp_path, {})):
    assert "--mode=evaluate" in section.reason
    assert "--workdir=0 " in section.reason


def test_networks_have_bars_of_their_own(tmp_path):
  """Fails where bars of different networks stand side by side as if schemes differed."""
  details = {"corruptions": corruptions()}
  made = groups(tmp_path, {"details": details},
                {"details": details, "changes": {"model.name": "efficientnet_tiny"}})
  (first, _), (second, _) = (robustness.sections(own, network)
                             for network, own in runs.by_network(made).items())
  assert "one_block" in first.title
  assert "efficientnet_tiny" in second.title
  assert not {panel.name for panel in first.panels} & {panel.name for panel in second.panels}


def test_seeds_of_other_numbers_of_images_or_restarts_are_not_averaged(tmp_path):
  """Fails where a mean over seeds is one of runs that were not measured alike."""
  (group,) = groups(tmp_path / "c", {"seed": 0, "details": {"corruptions": corruptions()}},
                    {"seed": 1, "details": {"corruptions": corruptions(0.02, images=3)}})
  found = robustness.corrupted(group, "corruptions")
  assert (found.runs, found.images, found.mean[0]) == (1, 12, pytest.approx(0.63))
  points = [{"epsilon": 1.0, "top1": 0.5, "standard_error": 0.1, "images": 12}]
  (group,) = groups(tmp_path / "s", *(
      {"seed": seed, "details": {"strength": {"attack": ATTACK, "restarts": restarts,
                                              "points": points}}}
      for seed, restarts in enumerate((1, 10))))
  assert robustness.strength(group).runs == 1
  assert robustness.strength(group).restarts == 1
