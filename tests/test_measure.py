"""Passes are compiled once, counted image by image, and go on after an interruption."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from advprop_jax import measure as measuring
from advprop_jax import trained
from advprop_jax.answers import (
  Answers,
  calibration_error,
  fingerprint,
  row,
  rows_of_sets,
  write_kept,
)
from advprop_jax.benchmarks import adversarial, contract, mce
from advprop_jax.benchmarks.corruptions import corrupt
from advprop_jax.errors import InputError
from advprop_jax.evaluate import create_subject, draw, evaluate, measure, subject_of
from advprop_jax.figures import sheet
from advprop_jax.measure import Measurer
from advprop_jax.method.attack import PIXEL
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.measure import measure_step, shown_step
from advprop_jax.method.step import attack_images, to_model_units
from advprop_jax.runtime import agreement
from tests.conftest import ROOT
from tests.small_run import make_config
from tests.test_evaluate import IMAGES, distinct_variables, small_experiment


@pytest.fixture
def subject():
  return subject_of(small_experiment())


def with_settings(subject, **settings):
  """The subject with other fields of config.eval."""
  config = ml_collections.ConfigDict(subject.config).copy_and_resolve_references()
  with config.unlocked():
    config.eval.update(settings)
  return dataclasses.replace(subject, config=ml_collections.FrozenConfigDict(config))


def measurer_of(subject):
  return Measurer(subject.model, subject.config)


@functools.cache
def clean_images():
  experiment = small_experiment()
  records = list(experiment.test_source)
  return (to_model_units(np.stack([record["image"] for record in records])),
          np.array([record["label"] for record in records]))


@pytest.mark.parametrize("ahead", [False, True])
def test_one_compilation_for_all_sets_and_strengths(ahead, subject, monkeypatch):
  """Fails where another epsilon, other classes or another set of images compile the step again, or
  where what was started ahead is not what is called."""
  traced = []

  def counted(step):
    def counted_step(*arguments, **settings):
      traced.append(step.__name__)
      return step(*arguments, **settings)
    return counted_step

  monkeypatch.setattr(measuring, "measure_step", counted(measure_step))
  monkeypatch.setattr(measuring, "shown_step", counted(shown_step))
  subject = with_settings(subject, benchmarks="clean,adversarial,auxiliary,strength",
                          strengths="0,1,4,16")
  measurer = measurer_of(subject)
  if ahead:
    measurer.start(distinct_variables(), [
        contract.test_pass(subject), contract.test_pass(subject, attack=subject.attack)])
    assert sorted(traced) == ["measure_step", "shown_step", "shown_step"]
  results = measure(subject, distinct_variables(), measurer)["results"]
  few = dataclasses.replace(contract.test_pass(subject), classes=(0, 1))
  answers = measurer.answers(distinct_variables(), dataclasses.replace(
      few, source=dataclasses.replace(few.source, records=Only(few.source, (0, 1)))))
  sheet.adversarial_picture(subject, distinct_variables(), measurer, sheet.examples_of(subject))
  # Images as they are, and attacked, through whichever batch norms; and the network.
  assert sorted(traced) == ["measure_step", "shown_step", "shown_step"]
  assert adversarial.AUXILIARY in results
  assert np.all(answers.top5)
  assert [name for name in results if "epsilon" in name] == [
      f"adversarial, epsilon {epsilon}" for epsilon in (0, 1, 4, 16)]
  top1 = [results[f"adversarial, epsilon {epsilon}"]["top1"] for epsilon in (0, 1, 4, 16)]
  loss = [results[f"adversarial, epsilon {epsilon}"]["loss"] for epsilon in (0, 1, 4, 16)]
  assert top1[0] == results["clean"]["top1"]
  assert loss == sorted(loss)
  assert loss[3] > 1.2 * loss[0]


@pytest.mark.parametrize("after_the_pass", [False, True])
def test_images_that_are_looked_at(subject, monkeypatch, after_the_pass):
  """Fails where what is said of one is said of another, or a few need the memory of a batch."""
  sizes = []
  monkeypatch.setattr(measuring.parallel, "shard", lambda batch, shard=measuring.parallel.shard: (
      sizes.append(len(batch["label"])), shard(batch))[1])
  places, variables, measurer = [IMAGES - 1, 3, 3, 20], distinct_variables(), measurer_of(subject)
  one = contract.test_pass(subject, attack=subject.attack, domain="adversarial")
  if after_the_pass:
    measurer.answers(variables, one)
  images, labels = (np.asarray(values)[places] for values in clean_images())
  seen = measurer.look(variables, one, {
      "image": np.round((images + 1) * 127.5).astype(np.uint8), "label": labels.astype(np.int32),
      "index": np.array(places, np.int32)})
  assert sizes[-1] == (subject.config.eval.batch_size if after_the_pass else len(places))
  assert 0 < np.max(np.abs(seen["shown"] - images)) <= 1.0001 * PIXEL * subject.attack.epsilon
  for domain, said in seen["said"].items():
    logits = subject.model.apply(variables, seen["shown"], domains=(domain,))
    np.testing.assert_array_equal(said, np.argmax(logits, -1))
  assert list(seen["said"]) == ["clean", "adversarial"]


def test_where_a_process_has_no_images_none_draws(subject, tmp_path, monkeypatch, capsys):
  """Fails where one process would wait for another in the picture's steps, or an old one stays."""
  file, arguments = tmp_path / "evaluation.png", (distinct_variables(), measurer_of(subject))
  assert draw(subject, *arguments, file)
  assert file.read_bytes().startswith(b"\x89PNG")
  with monkeypatch.context() as patch:
    patch.setattr(agreement, "first_of", lambda reason: reason or "process 1 has no 'val'")
    patch.setattr(Measurer, "look", None)
    assert not draw(subject, *arguments, file)
  assert not file.exists()

  def broken():
    raise InputError("test image 3 is broken")

  assert not draw(dataclasses.replace(subject, open_test=broken), *arguments, file)
  assert capsys.readouterr().out.splitlines() == [
      "No picture of adversarial images: process 1 has no 'val'",
      "No picture of adversarial images: test image 3 is broken"]
  with pytest.raises(InputError, match=r"gone/evaluation\.png"):
    draw(subject, *arguments, tmp_path / "gone/evaluation.png")


class Only:
  """Records of some labels."""

  def __init__(self, source, labels):
    self.rows = [i for i in range(len(source)) if source[i]["label"] in labels]
    self.source = source

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    return self.source[self.rows[i]]


def test_strength_scales_the_step(subject):
  """Fails where epsilon grows and the step that should reach its border does not."""
  attack = subject.attack
  for epsilon in (1.0, 24.0, 48.0):
    scaled = adversarial.scaled(attack, epsilon)
    assert scaled.epsilon == epsilon
    assert scaled.step_size == pytest.approx(attack.step_size * epsilon / attack.epsilon)
    assert scaled.num_steps == attack.num_steps
  none = dataclasses.replace(attack, epsilon=0.0)
  assert adversarial.scaled(none, 3.0).step_size == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["", "1,,2", "1,x", "-1,2", "1,1", "inf"])
def test_strengths_that_are_none(text):
  with pytest.raises(InputError, match=r"config.eval.strengths=.*numbers of at least 0"):
    evaluate(make_config({"eval.strengths": text}), "nowhere")


def test_unknown_benchmark(tmp_path):
  with pytest.raises(InputError, match="did you mean 'clean'"):
    evaluate(make_config({"eval.benchmarks": "clen,adversarial"}), str(tmp_path))


def test_restarts_take_the_strongest(subject):
  """Fails where one restart is not the plain attack, or more of them make it weaker."""
  weak = dataclasses.replace(subject.attack, epsilon=24.0, step_size=0.0, num_steps=0)  # noise
  variables = distinct_variables()

  def answers(restarts):
    subject_ = dataclasses.replace(with_settings(subject, restarts=restarts), attack=weak)
    one = adversarial.main_norms(subject_).passes[adversarial.MAIN]
    return measurer_of(subject_).answers(variables, one)

  images, labels = clean_images()
  model = subject.model

  def noisy(keys):
    x = attack_images(model, variables, "clean", weak, images, labels, keys)
    logits = model.apply(variables, x)
    return np.asarray(jnp.argmax(logits, -1) == labels), np.asarray(cross_entropy(logits, labels))

  keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(0), i) for i in range(IMAGES)])
  once, four = answers(1), answers(4)
  right, loss = noisy(keys)
  np.testing.assert_array_equal(once.top1, right)
  np.testing.assert_allclose(once.loss, loss, rtol=2e-3, atol=1e-4)
  all_right, losses = right, [loss]
  for restart in range(1, 4):
    right, loss = noisy(jax.vmap(lambda key, r=restart: jax.random.fold_in(key, 1000 + r))(keys))
    all_right, losses = all_right & right, [*losses, loss]
  np.testing.assert_array_equal(four.top1, all_right)
  assert np.all(four.loss <= np.max(losses, 0) + 1e-3)
  assert np.mean(four.loss) > np.mean(once.loss)


def test_transferred(run, tmp_path, subject):
  """Fails where the network is attacked itself, or through auxiliary batch norms of the other."""
  _, workdir = run
  subject = with_settings(subject, benchmarks="transfer", transfer_from=workdir)
  subject = create_subject(subject.config, subject.model, subject.class_names, subject.open_test,
                           None)
  results = measure(subject, distinct_variables(), measurer_of(subject))["results"]
  (name, result), = results.items()
  assert name.startswith("adversarial, transferred from one_block of run")
  other = trained.read_run(workdir)
  images, labels = clean_images()
  keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(0), i) for i in range(IMAGES)])
  x = jax.jit(lambda v: attack_images(other.model, v, "clean", subject.attack, images, labels, keys)
              )(other.deployed)
  logits = subject.model.apply(distinct_variables(), x)
  np.testing.assert_allclose(result["loss"], np.mean(cross_entropy(logits, labels)), rtol=2e-3)
  attacked = measure(with_settings(subject, benchmarks="adversarial"),
                     distinct_variables(), measurer_of(subject))["results"][adversarial.MAIN]
  assert attacked["loss"] > 1.1 * result["loss"]
  bad = with_settings(subject, transfer_from=str(tmp_path / "none.safetensors"))
  with pytest.raises(InputError, match=r"config\.eval\.transfer_from="):
    create_subject(bad.config, bad.model, bad.class_names, bad.open_test, None)


def test_apgd_is_at_least_as_strong_as_pgd(subject):
  """Fails where it is not the main network that is attacked, or not within the same ball."""
  subject = with_settings(subject, benchmarks="adversarial,apgd", apgd_steps=10)
  results = measure(subject, distinct_variables(), measurer_of(subject))["results"]
  pgd, apgd = results[adversarial.MAIN], results["adversarial, APGD-CE"]
  assert apgd["top1"] <= pgd["top1"]
  assert apgd["attack"]["epsilon"] == subject.attack.epsilon


def test_interrupted_and_gone_on(subject, tmp_path, monkeypatch):
  """Fails where images are counted twice or left out, or answers of other weights are taken."""
  one, variables = contract.test_pass(subject), distinct_variables()
  measurer, file = measurer_of(subject), tmp_path / "kept/clean.npz"
  whole = measurer.answers(variables, one)
  monkeypatch.setattr(measuring, "SECONDS_BETWEEN_SAVES", -1.0)
  taken, real = [], Answers.add

  def add(self, said):
    if len(taken) == 2:
      raise KeyboardInterrupt
    taken.append(np.asarray(said["index"]))
    real(self, said)

  with monkeypatch.context() as patch:
    patch.setattr(Answers, "add", add)
    with pytest.raises(KeyboardInterrupt):
      measurer.answers(variables, one, "clean", file)
  assert file.exists()
  taken.clear()
  with monkeypatch.context() as patch:
    patch.setattr(Answers, "add", lambda self, said: (taken.append(np.asarray(said["index"])),
                                                      real(self, said)))
    again = measurer.answers(variables, one, "clean", file)
    seen = np.concatenate(taken)
    assert np.min(seen[seen >= 0]) == 32                      # two batches of 16 are kept
    taken.clear()
    assert measurer.answers(variables, one, "clean", file).done == IMAGES
    assert not taken                                          # all are kept
    others = jax.tree.map(lambda x: 1.1 * x, variables)
    measurer.answers(others, one, "clean", file)
    assert len(taken) == 3                                    # other weights: nothing is
  for name in ("top1", "top5", "loss", "confidence"):
    np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
  file.write_bytes(b"not whole")
  assert measurer.answers(variables, one, "clean", file).done == IMAGES


KEY = """
from advprop_jax import answers
from advprop_jax.benchmarks.contract import test_pass
from tests.test_measure import measurer_of, distinct_variables, small_experiment, subject_of
subject = subject_of(small_experiment())
one = test_pass(subject)
print(answers.fingerprint(subject.model, subject.config, one,
                          measurer_of(subject)._given({"params": {"x": 1.0}}, one)))
"""


def test_another_process_finds_what_was_kept():
  """Fails where the key of kept answers has an address or a random hash in it."""
  keys = [subprocess.run([sys.executable, "-c", KEY], cwd=ROOT, capture_output=True, text=True,
                         check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
          for seed in "12"]
  assert len(keys[0].strip()) == 32
  assert keys[0] == keys[1]


def test_batches_of_another_size_go_on_too(subject, tmp_path):
  """Fails where what was kept does not end where a batch begins."""
  one, variables = contract.test_pass(subject), distinct_variables()
  file = tmp_path / "clean.npz"
  whole = measurer_of(subject).answers(variables, one)
  key = fingerprint(subject.model, subject.config, one, measurer_of(subject)._given(variables, one))
  part = dataclasses.replace(whole, done=20, **{
      name: getattr(whole, name).copy() for name in ("top1", "top5", "loss", "confidence")})
  part.loss[20:] = 1e6
  write_kept(file, key, part)
  again = measurer_of(subject).answers(variables, one, "clean", file)
  np.testing.assert_allclose(again.loss, whole.loss, rtol=1e-5)


def test_partial_results_that_cannot_be_written_end_nothing(subject, tmp_path, capsys):
  (tmp_path / "kept").write_text("a file, where the folder would be")
  one, variables = contract.test_pass(subject), distinct_variables()
  measurer = measurer_of(subject)
  answers = measurer.answers(variables, one, "clean", tmp_path / "kept/clean.npz")
  assert answers.done == IMAGES
  assert "goes on without partial results" in capsys.readouterr().err


def test_a_network_of_no_numbers(subject):
  variables = jax.tree.map(lambda x: x * np.nan, distinct_variables())
  with pytest.raises(InputError, match=r"gives no numbers for 38 of 38"):
    measurer_of(subject).answers(variables, contract.test_pass(subject))


def test_corrupted_images(subject):
  """Fails where a set is counted as another one, or the error of a mean takes the 75 sets of the
  same images for independent."""
  pytest.importorskip("imagecorruptions")
  subject = with_settings(subject, benchmarks="corruptions", corrupted_images=6, num_workers=2)
  results = measure(subject, distinct_variables(), measurer_of(subject))
  detail, total = results["details"]["corruptions"], results["results"]["corruptions"]
  model, by_image = subject.model, []
  apply = jax.jit(functools.partial(model.apply, distinct_variables()))
  source = small_experiment().test_source
  labels = np.array([source[i]["label"] for i in range(6)])
  for name, severity in mce.SETTINGS:
    images = np.stack([corrupt(source[i]["image"], name, severity, (0, i)) for i in range(6)])
    right = np.argmax(apply(to_model_units(images)), -1) == labels
    assert detail["errors"][name][severity] == pytest.approx(1 - right.mean()), (name, severity)
    by_image.append(right)
  means = np.mean(by_image, 0)
  assert total["top1"] == pytest.approx(means.mean())
  assert total["standard_error"] == pytest.approx(means.std(ddof=1) / np.sqrt(6))
  assert total["images"] == 6 * 75
  assert detail["mce"] is None


def test_calibration_error():
  """Against loops over bins; fails where an edge is in the wrong bin, or bins weigh the same."""
  rng = np.random.default_rng(0)
  confidence = np.concatenate([rng.uniform(0.1, 1, 500) ** 2, [0.2, 0.4, 1.0, 1.0, 1 / 15]])
  right = rng.uniform(size=505) < confidence ** 0.5
  expected = 0.0
  for low in range(15):
    inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
    if inside.any():
      expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
  assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-12)
  assert calibration_error(np.ones(4, np.float32), np.array([True, True, True, False])) == 0.25


def test_sets_weigh_the_same(subject):
  """Fails where a large set counts more, or errors of independent sets are not added in squares."""
  source = small_experiment().test_source
  one = dataclasses.replace(contract.test_pass(subject), source=source, sets={"a": 8, "b": 30})
  answers = Answers(np.array([True] * 8 + [False] * 15 + [True] * 15), np.ones(38, bool),
                    np.arange(38, dtype=np.float32), np.full(38, 0.5, np.float32), 38)
  sets, total = rows_of_sets(one, answers), row(one, answers)
  assert (sets["a"]["top1"], sets["b"]["top1"]) == (1.0, 0.5)
  assert sets["b"]["loss"] == pytest.approx(np.arange(8, 38).mean())
  assert total["top1"] == 0.75
  assert total["standard_error"] == pytest.approx(np.sqrt(0.25 / 30) / 2)
  assert total["images"] == 38


def test_another_convention_is_another_network(subject, tmp_path):
  """Fails where answers that were kept of a network are taken for those of one that reads other
  numbers, with the same weights."""
  one, variables, file = contract.test_pass(subject), distinct_variables(), tmp_path / "clean.npz"
  measurer_of(subject).answers(variables, one, "clean", file)
  other = dataclasses.replace(subject, model=subject.model.clone(input_convention="imagenet"))
  fresh = measurer_of(other).answers(variables, one)
  again = measurer_of(other).answers(variables, one, "clean", file)
  np.testing.assert_array_equal(again.loss, fresh.loss)
