"""The whole loop, with a network of one block: what it writes, how it resumes, how it stops."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from advprop_jax import evaluate, train
from advprop_jax import experiment as experiments
from advprop_jax import measure as measuring
from advprop_jax.benchmarks import adversarial
from advprop_jax.benchmarks.clean import CLEAN
from advprop_jax.errors import InputError
from advprop_jax.experiment import create_experiment, fresh_state
from advprop_jax.runtime import compilation
from advprop_jax.runtime.checkpoint import Checkpoints
from advprop_jax.runtime.config import default_config
from tests import one_block, pods
from tests.conftest import ROOT

STEPS = 8


@pytest.fixture(autouse=True)
def _registered():
  one_block.register()


def make_config(**changes):
  config = default_config()
  config.model.name = "one_block"
  config.attack.num_steps = 1
  config.data.batch_size = 20
  config.data.train_split, config.data.test_split = "train[:100]", "test[:50]"
  config.eval.batch_size = 16                          # 50 is no multiple of it
  config.train.steps = STEPS
  config.train.log_every = 1
  config.eval.every_steps = 4
  config.checkpoint.every_steps = 2
  config.optimizer.schedule = "constant"
  for path, value in changes.items():
    section, name = path.split("__")
    config[section][name] = value
  return config


def final_state(workdir):
  """The state of the newest checkpoint."""
  config = default_config()
  config.update(json.loads((workdir / "config.json").read_text()))
  abstract = jax.eval_shape(lambda: fresh_state(create_experiment(config)))
  with Checkpoints(os.path.join(workdir, "checkpoints"), write=False) as checkpoints:
    return checkpoints.restore_latest(abstract).state


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run from start to end."""
  one_block.register()
  workdir = tmp_path_factory.mktemp("undisturbed")
  summary = train.train(make_config(), str(workdir))
  return workdir, summary


def test_what_a_run_leaves(undisturbed):
  workdir, summary = undisturbed
  names = {path.name for path in workdir.iterdir()}
  assert {"config.json", "summary.json", "metrics.jsonl", "adversarial.png", "checkpoints",
          "tensorboard"} <= names
  assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
  assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "one_block"
  results = summary["results"]
  assert set(results) == {CLEAN, adversarial.MAIN, adversarial.AUXILIARY}
  for result in results.values():
    assert result["images"] == 50
    assert 0 <= result["top1"] <= 1
    assert result["loss"] > 0
  assert summary["training"]["images_per_second"] > 0
  steps = [line["step"] for line in lines(workdir) if "train/loss" in line]
  assert steps == list(range(1, STEPS + 1))
  assert {"train/loss/clean", "train/loss/adversarial", "train/learning_rate"} <= set(
      lines(workdir)[0])
  assert [line["step"] for line in lines(workdir) if "test/clean_top1" in line] == [4, 8]


def test_evaluation_of_the_run_is_the_same(undisturbed, capsys):
  """--mode=evaluate measures what the training measured at its end; `eval` fields may change."""
  workdir, summary = undisturbed
  again = evaluate.evaluate(make_config(eval__batch_size=25), str(workdir))
  for name, result in summary["results"].items():
    np.testing.assert_allclose(again["results"][name]["top1"], result["top1"])
    np.testing.assert_allclose(again["results"][name]["loss"], result["loss"], rtol=1e-4)
  assert "adversarial, auxiliary BN" in capsys.readouterr().out


def test_resumed_is_never_stopped(undisturbed, tmp_path):
  """Stopped after a third of the steps and started again: bit for bit the same, data included."""
  workdir, summary = undisturbed

  class Stop(Exception):
    pass

  real, calls = train.require_finite, []

  def stop_at_3(step, metrics, batches):
    real(step, metrics, batches)
    calls.append(step)
    if step == 3:
      raise Stop

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "require_finite", stop_at_3)
    with pytest.raises(Stop):
      train.train(make_config(), str(tmp_path))
  resumed = train.train(make_config(), str(tmp_path))
  assert resumed["training"]["start_step"] == 2
  assert resumed["results"] == summary["results"]
  assert_same_bits(final_state(tmp_path), final_state(workdir))

  def numbers(path):
    return [{k: v for k, v in line.items() if k != "train/images_per_second"}
            for line in lines(path)]

  assert numbers(tmp_path) == numbers(workdir)          # no step twice, none missing


def test_what_machines_ask_for_may_change(undisturbed, tmp_path):
  """Fails where a run of other devices is refused, or another learning rate is not."""
  workdir, _ = undisturbed
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/checkpoints/8")
  config = make_config(model__remat=True, train__accumulation=2, train__max_skips=1,
                       checkpoint__keep=3)
  train.claim_workdir(create_experiment(config, str(tmp_path / "run")), str(tmp_path / "run"))
  saved = json.loads((tmp_path / "run/config.json").read_text())
  assert (saved["model"]["remat"], saved["train"]["accumulation"]) == (True, 2)
  other = create_experiment(make_config(optimizer__learning_rate=0.123), str(tmp_path / "run"))
  with pytest.raises(InputError, match=r"optimizer\.learning_rate"):
    train.claim_workdir(other, str(tmp_path / "run"))


def test_a_finished_run_is_only_evaluated_again(undisturbed):
  workdir, summary = undisturbed
  before = final_state(workdir)
  again = train.train(make_config(), str(workdir))
  assert again == {**summary, "evaluation_seconds": again["evaluation_seconds"]}
  assert_same_bits(before, final_state(workdir))


def test_the_step_compiles_once(tmp_path):
  """Also after a resumption: fails where a fresh or restored state lies elsewhere than a result."""
  compiled = []

  def listen(event, _, fun_name=None, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for _ in range(2):  # fresh, then resumed
      compiled.clear()
      train.train(make_config(train__steps=5), str(tmp_path))
      pmapped = [name for name in compiled if "_fun" in name]
      assert len(pmapped) == 4, compiled  # the train step and three kinds of evaluation
      shutil.rmtree(tmp_path / "checkpoints" / "5")
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  """The step is named, and the checkpoint before it is whole.

  Fails where a state is kept before its step's loss has been looked at.
  """
  with pytest.raises(InputError, match=r"step [2-4]: the loss is not finite"):
    train.train(make_config(optimizer__learning_rate=1e38, checkpoint__every_steps=1),
                str(tmp_path))
  kept = final_state(tmp_path)
  assert int(kept.step) >= 1
  for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
    assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


def test_a_workdir_of_another_config(undisturbed):
  workdir, _ = undisturbed
  with pytest.raises(InputError) as error:
    train.train(make_config(attack__epsilon=2.0), str(workdir))
  assert "attack.epsilon: 4.0 -> 2.0" in str(error.value)
  assert str(workdir) in str(error.value)


def test_a_checkpoint_of_another_config_is_not_gone_on_with(undisturbed, tmp_path):
  """Fails where config.json alone is looked at, which may be lost."""
  shutil.copytree(undisturbed[0], tmp_path / "run")
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(InputError, match=r"attack.epsilon: 4.0 -> 2.0"):
    train.train(make_config(attack__epsilon=2.0), str(tmp_path / "run"))


def test_workers_and_threads_may_change_during_a_run(undisturbed, tmp_path):
  """Fails where a run cannot go on with others, or does not go on with the images that follow."""
  shutil.copytree(undisturbed[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
  resumed = train.train(make_config(data__num_workers=1, data__num_threads=1),
                        str(tmp_path / "run"))
  assert resumed["training"]["start_step"] == STEPS - 2
  assert_same_bits(final_state(tmp_path / "run"), final_state(undisturbed[0]))


@pytest.mark.parametrize("text", ["[1]", '{"model": {"na', ""])
def test_a_config_that_is_not_whole(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  for verb in (train.train, evaluate.evaluate):
    with pytest.raises(InputError, match=r"config.json is not whole"):
      verb(make_config(), str(tmp_path))


@pytest.mark.parametrize(("steps", "compiling"), [(0, False), (1, False), (1, True)])
def test_what_is_compiled_beside_what(steps, compiling, tmp_path, monkeypatch):
  """Fails where the step waits for the fresh state, where a step is compiled that is never made, or
  where an evaluation's programs wait for their turn while the step is compiled."""
  events = []

  class Noted(compilation.Program):
    def start(self, *args):
      events.append(f"start {self._name}")
      return super().start(*args)

    def __call__(self, *args):
      events.append(f"call {self._name}")
      return super().__call__(*args)

  for module in (train, experiments, measuring):
    monkeypatch.setattr(module, "Program", Noted)
  if compiling:
    def slowly(work, beside=compilation._beside):
      return beside(lambda give: (time.sleep(1), work(give)))

    monkeypatch.setattr(compilation, "_beside", slowly)
  else:
    monkeypatch.setattr(train, "is_compiling", lambda: False)
  train.train(make_config(train__steps=steps), str(tmp_path))
  ahead = ["start shown_step", "start measure_step"] * 2 if compiling else []
  before = ["start fresh_state", *["start train_step"] * steps, "call fresh_state", *ahead,
            *["call train_step"] * steps, "call shown_step"]
  assert events[:len(before)] == before
  assert events.count("start shown_step") == 2     # images as they are, and attacked


def test_less_than_one_step_is_not_trained():
  config = make_config(train__steps=None, train__epochs=0.01)
  with pytest.raises(InputError, match=r"config.train.epochs=0.01: less than one step"):
    create_experiment(config)


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="workdir"):
    train.train(make_config(), str(tmp_path / "file" / "run"))


def test_nothing_to_evaluate(tmp_path):
  with pytest.raises(InputError, match="no checkpoint"):
    evaluate.evaluate(make_config(), str(tmp_path))


def test_vanilla_has_no_auxiliary_result(tmp_path, capsys):
  config = make_config(train__steps=2)
  config.scheme = "vanilla"
  summary = train.train(config, str(tmp_path))
  assert set(summary["results"]) == {CLEAN, adversarial.MAIN}
  assert set(summary["skipped"]) == {"auxiliary"}
  assert "skipped: auxiliary: the network has no auxiliary" in capsys.readouterr().out


def test_the_attack_of_the_evaluation_can_be_set(undisturbed):
  """Fails where it takes the place of what the training measured at its end."""
  workdir, summary = undisturbed
  written = (workdir / "summary.json").read_bytes()
  stronger = evaluate.evaluate(make_config(eval__epsilon=64.0, eval__num_steps=4,
                                           eval__step_size=32.0), str(workdir))
  assert (workdir / "summary.json").read_bytes() == written
  assert json.loads((workdir / "evaluation.json").read_text())["attack"]["epsilon"] == 64.0
  assert stronger["attack"]["epsilon"] == 64.0
  main = adversarial.MAIN
  assert stronger["results"][main]["loss"] > summary["results"][main]["loss"]
  assert stronger["results"][CLEAN] == summary["results"][CLEAN]


def test_killed_five_times(tmp_path):
  """SIGKILL at random moments, five times, then left alone: the same bits as an undisturbed run."""
  flags = ["--config=configs/quickstart.py", "--config.model.name=one_block",
           "--config.data.train_split=train[:200]", "--config.data.test_split=test[:20]",
           "--config.data.batch_size=20", "--config.eval.batch_size=20", "--config.train.steps=120",
           "--config.eval.benchmarks=clean,adversarial",
           "--config.checkpoint.every_steps=3", "--config.eval.every_epochs=0",
           "--config.train.log_every=1"]
  errors = (tmp_path / "errors").open("w")

  def start(workdir):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.one_block", f"--workdir={workdir}", *flags], cwd=ROOT,
        env=pods.environment(tmp_path / "cache"), stdout=subprocess.DEVNULL, stderr=errors)

  def reached(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0

  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  process = start(undisturbed)
  assert process.wait() == 0, (tmp_path / "errors").read_text()
  chance = random.Random(0)
  for kill in range(5):
    process, deadline = start(killed), time.monotonic() + 120
    before = reached(killed)
    target = 20 * kill + chance.randint(4, 18)          # step to be killed at, or soon after
    while reached(killed) < target or (reached(killed) == before and before > 0):
      assert process.poll() is None, (tmp_path / "errors").read_text()
      assert time.monotonic() < deadline
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  process = start(killed)
  assert process.wait() == 0, (tmp_path / "errors").read_text()
  assert_same_bits(final_state(killed), final_state(undisturbed))
  results = [json.loads((path / "summary.json").read_text())["results"]
             for path in (killed, undisturbed)]
  assert results[0] == results[1]
  errors.close()
