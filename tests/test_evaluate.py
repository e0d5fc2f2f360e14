"""Each evaluation goes through the batch norms that its name says, with the attack that it says."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from advprop_jax.benchmarks import adversarial
from advprop_jax.benchmarks.clean import CLEAN
from advprop_jax.data.transforms import evaluation_transform
from advprop_jax.evaluate import attacked_domain, measure, subject_of
from advprop_jax.experiment import Experiment, create_experiment, fresh_state
from advprop_jax.measure import Measurer
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.schemes import SCHEMES
from advprop_jax.method.step import attack_images, to_model_units
from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.parallel import hurried
from tests import one_block
from tests.conftest import ROOT

IMAGES, BATCH = 38, 16                                 # the last batch is ragged


@functools.cache
def small_experiment() -> Experiment:
  """AdvProp with a network of one block, whose attack is strong."""
  one_block.register()
  config = default_config()
  config.model.name = "one_block"
  config.data.train_split, config.data.test_split = "train[:100]", f"test[:{IMAGES}]"
  config.data.batch_size, config.eval.batch_size = 16, BATCH
  config.attack.epsilon, config.attack.step_size, config.attack.num_steps = 24.0, 8.0, 3
  return create_experiment(config)


@functools.cache
def distinct_variables() -> dict:
  """Variables whose domains have statistics, scales and biases that have nothing in common."""
  rng = np.random.default_rng(57)

  def draw(path, x):
    name = path[-1]
    if name.startswith(("mean", "bias")):
      return rng.normal(0, 0.5, x.shape).astype(np.float32)
    if name.startswith(("var", "scale")):
      return rng.uniform(0.3, 2, x.shape).astype(np.float32)
    return x if path[:2] != ("params", "classifier") else 6 * x

  variables = hurried(lambda: fresh_state(small_experiment()))().variables
  flat = traverse_util.flatten_dict(jax.device_get(variables))
  return traverse_util.unflatten_dict({path: draw(path, x) for path, x in flat.items()})


@functools.cache
def measured() -> dict:
  """What is measured of it."""
  experiment = small_experiment()
  measurer = Measurer(experiment.method.model, experiment.config)
  return measure(subject_of(experiment), distinct_variables(), measurer)


@pytest.fixture(scope="module")
def by_hand():
  """{(domain attacked or None, domain that classifies): (top1, loss)}, of all images at once."""
  experiment, variables = small_experiment(), distinct_variables()
  model, source = experiment.method.model, experiment.test_source
  transform = evaluation_transform(experiment.config.data.image_size)
  clean = to_model_units(np.stack([transform(record["image"]) for record in source]))
  labels = np.array([record["label"] for record in source])
  keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(0), i) for i in range(IMAGES)])
  logits, images = {}, {None: clean}
  for domain in ("clean", "adversarial"):
    logits[domain] = jax.jit(functools.partial(model.apply, domains=(domain,)))
    attack = jax.jit(functools.partial(attack_images, model, variables, domain,
                                       experiment.eval_attack))
    images[domain] = attack(clean, labels, keys)

  def measure(images, domain):
    guesses = logits[domain](variables, images)
    return (float(np.mean(np.argmax(guesses, axis=-1) == labels)),
            float(jnp.mean(cross_entropy(guesses, labels))))

  return {(attacked, domain): measure(images[attacked], domain)
          for attacked in images for domain in logits}


def test_the_cases_can_be_told_apart(by_hand):
  """Fails where the other tests could not see which batch norms were attacked and classified."""
  losses = sorted(loss for _, loss in by_hand.values())
  assert np.min(np.diff(losses)) > 0.5, by_hand
  assert len({top1 for top1, _ in by_hand.values()}) >= 5, by_hand


@pytest.mark.parametrize(("name", "attacked", "domain"), [
    (CLEAN, None, "clean"), (adversarial.MAIN, "clean", "clean"),
    (adversarial.AUXILIARY, "adversarial", "adversarial")])
def test_an_evaluator_is_what_its_name_says(by_hand, name, attacked, domain):
  """Fails where an evaluator has another's domain, or no attack, or one through other batch norms.

  So does it where padding is counted, or where images are attacked from the start of others.
  """
  result = measured()["results"][name]
  top1, loss = by_hand[attacked, domain]
  assert result["images"] == IMAGES
  np.testing.assert_allclose(result["loss"], loss, rtol=2e-3)
  np.testing.assert_allclose(result["top1"], top1, atol=1e-6)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_auxiliary_domain_is_the_one_that_is_attacked(scheme):
  """Fails where a scheme without auxiliary adversarial batch norms is said to have them."""
  domains = SCHEMES[scheme].domains
  expected = "adversarial" if "adversarial" in domains else None
  assert attacked_domain(SCHEMES[scheme], domains) == expected
  assert attacked_domain(SCHEMES[scheme], domains[:1]) is None      # the network that is deployed


def test_four_devices_count_each_image_once(tmp_path):
  """1,003 images in batches of 64 on 4 devices: fails where padding is counted, or an end is lost.

  So does it where the workers that make the batches change what the network sees.
  """
  def evaluated(workdir, devices, *flags):
    done = subprocess.run(
        [sys.executable, "-m", "tests.one_block", "--config=configs/quickstart.py:scheme=vanilla",
         f"--workdir={workdir}", "--config.model.name=one_block", "--config.train.steps=0",
         "--config.data.train_split=train[:64]", "--config.data.test_split=test[:1003]",
         "--config.eval.batch_size=64", "--config.eval.benchmarks=clean,adversarial", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1 "
             f"--xla_force_host_platform_device_count={devices}"})
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["devices"] == devices
    return summary["results"]

  four = evaluated(tmp_path / "four", 4, "--config.data.num_workers=2")
  one = evaluated(tmp_path / "one", 1)
  assert four[CLEAN]["images"] == four[adversarial.MAIN]["images"] == 1003
  assert four[CLEAN]["top1"] == one[CLEAN]["top1"]
  np.testing.assert_allclose(four[CLEAN]["loss"], one[CLEAN]["loss"], rtol=1e-5)
