"""Distances in the bank are those of the formulas, and layers stand in the order of the pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax import models
from advprop_jax.figures import bank, runs
from advprop_jax.trained import TrainedNetwork
from tests import one_block
from tests.figures.test_runs import read, workdir
from tests.small_run import random_variables

DOMAINS = ("clean", "adversarial")


def hand_made():
  """A bank of two layers of two channels with known differences."""
  layer = {bank.MEAN: [np.array([0.0, 1.0])] * 2, bank.VARIANCE: [np.array([3.75, 8.75])] * 2,
           bank.SCALE: [np.array([3.0, -4.0]), np.zeros(2)], bank.BIAS: [np.array([0.0, 1.0])] * 2}
  other = {bank.MEAN: [np.array([1.0, -2.0])] * 2,
           bank.VARIANCE: [np.array([3.75, 35.75])] * 2,
           bank.SCALE: [np.array([3.0, 1.0]), np.ones(2)], bank.BIAS: [np.array([5.0, 1.0])] * 2}
  return bank.Bank((("a",), ("b",)), DOMAINS, {"clean": layer, "adversarial": other}, 0.25)


def test_distances_of_a_known_bank():
  """Fails where a formula is another than the caption's: units, signs that cancel, a root."""
  found = bank.distances(hand_made(), "adversarial")
  # |1| / sqrt(3.75 + 0.25) and |-3| / sqrt(8.75 + 0.25)
  np.testing.assert_allclose(found[bank.MEAN], [(0.5 + 1) / 2] * 2)
  np.testing.assert_allclose(found[bank.VARIANCE], [np.log(4) / 2] * 2)
  unit = np.sqrt((9 + 16) / 2)
  np.testing.assert_allclose(found[bank.SCALE], [2.5 / unit, np.nan])
  np.testing.assert_allclose(found[bank.BIAS], [2.5 / unit, np.nan])


def test_distances_have_no_scale():
  """Fails where a layer whose input is ten times as large seems to be further apart."""
  one, epsilon = hand_made(), 0.25

  def larger(parameters):
    return {**parameters, bank.MEAN: [10 * mean for mean in parameters[bank.MEAN]],
            bank.VARIANCE: [100 * (var + epsilon) - epsilon for var in parameters[bank.VARIANCE]],
            bank.SCALE: [7 * scale for scale in parameters[bank.SCALE]],
            bank.BIAS: [7 * bias for bias in parameters[bank.BIAS]]}

  other = dataclasses.replace(one, parameters={
      domain: larger(own) for domain, own in one.parameters.items()})
  for kind, values in bank.distances(one, "adversarial").items():
    np.testing.assert_allclose(bank.distances(other, "adversarial")[kind], values, err_msg=kind)


def make(domains=DOMAINS, **settings):
  model = one_block.create(domains=domains, **settings)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), dict(shapes))


def test_the_bank_of_a_network():
  """Fails where the two domains are exchanged, or a value is that of another layer."""
  model, variables = make()
  found = bank.bank_of(model, variables)
  assert found.layers == (("stem_norm",), ("stage_1_block_1", "expand_norm"),
                          ("stage_1_block_1", "depthwise_norm"),
                          ("stage_1_block_1", "project_norm"), ("head_norm",))
  place = found.layers.index(("head_norm",))
  for domain, collection, suffix in (("clean", "batch_stats", ""),
                                     ("adversarial", "batch_stats_adversarial", "_adversarial")):
    own = found.parameters[domain]
    for kind, expected in {bank.MEAN: variables[collection]["head_norm"]["mean"],
                           bank.VARIANCE: variables[collection]["head_norm"]["var"],
                           bank.SCALE: variables["params"]["head_norm"]["scale" + suffix],
                           bank.BIAS: variables["params"]["head_norm"]["bias" + suffix]}.items():
      np.testing.assert_array_equal(own[kind][place], expected)


@pytest.mark.parametrize(("settings", "kept"), [
    ({"share_statistics": True}, [bank.SCALE, bank.BIAS]),
    ({"share_affine": True}, [bank.MEAN, bank.VARIANCE]),
    ({"domains": ("clean", "autoaugment", "adversarial")}, list(bank.UNITS))])
def test_shared_parts_and_other_domains(settings, kept):
  """Fails where a shared part is drawn as a distance of 0, or a third domain is forgotten."""
  model, variables = make(**settings)
  found = bank.bank_of(model, variables)
  for domain in model.domains[1:]:
    assert list(bank.distances(found, domain)) == kept
  assert [kind for kind in bank.UNITS if not found.shared(kind)] == kept


@pytest.mark.parametrize(("name", "first", "last"), [
    ("efficientnet_b0", ("stem_norm",), ("head_norm",)),
    ("resnet50", ("stem_norm",), ("stage_4_block_3", "norm_3"))])
def test_layers_in_the_order_of_the_pass(name, first, last):
  """Fails where they stand in the order of their names, where the head comes first."""
  layers = bank.layer_order(models.create_model(name, 10, DOMAINS))
  assert (layers[0], layers[-1]) == (first, last)
  stages = [int(layer[0].split("_")[1]) for layer in layers if layer[0].startswith("stage")]
  assert stages == sorted(stages)
  assert len(layers) == {"efficientnet_b0": 49, "resnet50": 53}[name]


def network_of(run, domains):
  return TrainedNetwork("one_block", random_variables(10, domains), "inception", None, 28, 1.0,
                        "step 2", run.config, 2)


@pytest.mark.parametrize(("scheme", "changes", "panels"), [
    ("advprop", {}, 8),
    ("advprop", {"model.share_statistics": True}, 6),
    ("fine_grained", {"data.second_augment": "autoaugment"}, 12)])
def test_panels(tmp_path, scheme, changes, panels):
  """Fails where a bank of that kind cannot be drawn, or a shared part without saying so."""
  groups = runs.groups_of(read(workdir(tmp_path / "a", scheme, changes=changes)))
  run = groups[0].first
  domains = {"advprop": DOMAINS}.get(scheme, ("clean", "autoaugment", "adversarial"))
  section = bank.section(groups, {"a": network_of(run, domains)})
  assert len(section.panels) == panels
  shared = [panel for panel in section.panels if "shared by all domains" in panel.alt]
  assert len(shared) == (2 if changes.get("model.share_statistics") else 0)


def test_without_a_bank(tmp_path):
  """Fails where a vanilla network is read in vain, or one that cannot be read ends the report."""
  vanilla, ours = runs.groups_of(read(workdir(tmp_path / "v", "vanilla"), workdir(tmp_path / "a")))
  assert "no run has auxiliary" in bank.section([vanilla], {}).reason
  assert bank.section([vanilla, ours], {"a": "no checkpoint"}).reason == "a: no checkpoint."


def test_channels_are_spread():
  """Fails where a scatter plot shows the first channels alone."""
  assert list(bank.spread(5, 150)) == [0, 1, 2, 3, 4]
  places = bank.spread(1000, 150)
  assert (len(places), places[0], places[-1]) == (150, 0, 999)
