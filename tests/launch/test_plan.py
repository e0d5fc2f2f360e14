"""launch/plan.py: the step that is compiled, what is kept of it, what is printed."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from advprop_jax.errors import InputError
from advprop_jax.method import attack as attacks
from advprop_jax.runtime.config import default_config
from launch import fitting, plan_report, recipe, slices, step_program
from tests.small_run import make_config

ROOT = pathlib.Path(__file__).parents[2]
EFFICIENTNET = str(ROOT / "configs" / "imagenet_efficientnet.py")


def recipe_of(changes=None, topology="v5e:1x1"):
  return recipe.make_recipe(make_config(changes), slices.parse_slice(topology), 10, 1000)


@pytest.fixture(scope="module")
def compiled():
  """The step of one block, for the one CPU device that is here."""
  return step_program.compile_step(recipe_of({"attack.num_steps": 4}), jax.devices()[:1])


def test_the_step_compiles_from_shapes(compiled):
  assert compiled.fits
  assert {found["group"] for found in compiled.collectives} == {1}
  assert compiled.flops > compiled.flops_once > 0
  assert compiled.bytes["arguments"] > 20 * 28 * 28 * 3
  assert compiled.bytes["outputs"] < 1e4  # the state's memory is that of the state given in


def test_what_is_kept_is_of_one_program(compiled, tmp_path):
  """Another batch is another program; where the data lies and what is evaluated are not."""
  step_program.keep(recipe_of(), compiled, tmp_path / "new")
  kept = step_program.cached(recipe_of({"data.dir": "/elsewhere", "eval.batch_size": 1}),
                             tmp_path / "new")
  assert json.loads(json.dumps(dataclasses.asdict(kept))) == json.loads(
      json.dumps(dataclasses.asdict(compiled)))
  for other in (recipe_of({"data.batch_size": 40}), recipe_of({"attack.num_steps": 2}),
                recipe_of(topology="v6e:1x1")):
    assert step_program.cached(other, tmp_path / "new") is None


def test_what_is_kept_is_of_one_compiler(compiled, tmp_path, monkeypatch):
  step_program.keep(recipe_of(), compiled, tmp_path)
  monkeypatch.setattr(slices, "libtpu_version", lambda: "1.2.3")
  assert step_program.cached(recipe_of(), tmp_path) is None


def test_a_broken_file_or_no_folder_keeps_nothing(compiled, tmp_path):
  step_program.keep(recipe_of(), compiled, tmp_path)
  [file] = tmp_path.iterdir()
  file.write_text(file.read_text()[:100])
  assert step_program.cached(recipe_of(), tmp_path) is None
  (tmp_path / "file").write_text("")
  step_program.keep(recipe_of(), compiled, tmp_path / "file" / "folder")


@pytest.mark.parametrize(("words", "needed", "available"), [
  ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
   "(68.02G) exceeds available HBM (15.75G).", 68.02, 15.75),
  ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.20G of 15.75G hbm. Exceeded "
   "hbm capacity by 2.45G.", 18.20, 15.75)])
def test_the_compilers_refusals(words, needed, available):
  refused = step_program.refusal(words)
  assert (refused.fits, refused.needed_bytes, refused.available_bytes) == (
      False, round(needed * 2**30), round(available * 2**30))
  assert step_program.refusal("INVALID_ARGUMENT: something else") is None


def test_the_slices_chips_are_chosen():
  """Where the file has that choice, and the variant does not say it."""
  def chosen(config, topology="v5e:4x4"):
    return recipe.with_chips(["plan.py", f"--config={config}", f"--topology={topology}"])[1][9:]

  assert chosen(EFFICIENTNET + ":b7") == EFFICIENTNET + ":b7,chips=16"
  assert chosen(EFFICIENTNET) == EFFICIENTNET + ":chips=16"
  for said in (":b7,chips=8", ":8"):
    assert chosen(EFFICIENTNET + said) == EFFICIENTNET + said
  assert chosen(EFFICIENTNET + ":b7", "v4:4x4x12") == EFFICIENTNET + ":b7"  # 192 is no choice
  quickstart = str(ROOT / "configs" / "quickstart.py")
  assert chosen(quickstart) == quickstart
  assert recipe.with_chips(["plan.py", "--config", EFFICIENTNET, "--topology", "v5e:2x2"])[2] == (
      EFFICIENTNET + ":chips=4")


def test_imagenet_is_known_and_other_data_is_asked_for():
  config = default_config()
  config.data.name, config.data.batch_size = "imagenet2012", 256
  made = recipe.make_recipe(config, slices.parse_slice("v5e:1x1"))
  assert (made.num_classes, made.num_images) == (1000, 1_281_167)
  config.data.name, config.data.dir = "folder", "/nowhere"
  with pytest.raises(InputError, match="or give --classes and --images"):
    recipe.make_recipe(config, slices.parse_slice("v5e:1x1"))


def collective(depth=0, times=1, group=4, size=10**6):
  return {"kind": "all-reduce", "bytes": size, "depth": depth, "times": times, "group": group,
          "source": ""}


def attempt_of(**changes):
  compiled = step_program.Compiled(
      fits=True, needed_bytes=8 * 2**30, bytes={"temporaries": 2**30}, flops=197 * 10**12,
      flops_once=10**12, xla_flops=1.1e12, compile_seconds=60.0,
      collectives=(collective(), collective(), collective(1, 5, 2, 500)))
  return fitting.Attempt(recipe_of({"train.steps": 86400}), dataclasses.replace(
      compiled, **changes))


def test_days_follow_from_flops_and_the_assumed_share_of_the_peak():
  """A step of a second at the peak, 86,400 of them, at a quarter: four days."""
  found = plan_report.estimate(attempt_of(), 0.25)
  assert (found.steps, found.seconds_per_step, found.days) == (86400, 4.0, 4.0)
  assert found.flops_per_image == 197e12 / 20


def test_the_report():
  refused = attempt_of(fits=False, needed_bytes=20 * 2**30, available_bytes=15 * 2**30)
  said = plan_report.text([refused, attempt_of()], 0.25)
  for part in ("it needs 20.00 of 15.00 GiB", "it needs 8.00 of 16.00 GiB", "4 days", "assumption",
               "2 all-reduce in groups of 4, outside of loops: 2.000 MB",
               "1 all-reduce in groups of 2, inside of 1 loop, 5 times: 0.001 MB each time"):
    assert part in said
  alone = plan_report.text([refused], 0.25)
  assert "does not fit" in alone
  assert "days" not in alone


def test_the_report_for_programs():
  refused = attempt_of(fits=False, needed_bytes=20 * 2**30, available_bytes=15 * 2**30)
  found = json.loads(json.dumps(plan_report.as_json([refused, attempt_of()], 0.25)))
  assert (found["fits"], found["at_once"], found["days"]) == (True, 20, 4.0)
  assert found["tried"][0]["needed_bytes"] == 20 * 2**30
  assert found["collective_totals"]["all-reduce"]["outside_bytes"] == 2 * 10**6
  assert "days" not in plan_report.as_json([refused], 0.25)


@pytest.mark.parametrize(("arguments", "says"), [
  (["--topology=v5e:3x3"], "--topology=v5e:3x3: there is no such slice; there is v5e:1x1"),
  ([], "--topology: not given"),
  (["--topology=v5e:2x2", "--config.model.nmae=x"], "did you mean config.model.name?"),
  (["--topology=v5e:2x2", "--config.train.accumulation=3"], "do not divide it"),
  (["--topology=v5e:2x2", "--utilisation=2"], "utilisation")])
def test_bad_input_is_one_sentence(arguments, says):
  """And exit code 2. The command as a user types it, from another folder."""
  ran = subprocess.run(
      [sys.executable, str(ROOT / "launch" / "plan.py"), f"--config={EFFICIENTNET}:b0", *arguments],
      capture_output=True, text=True, check=False, cwd="/", env=dict(os.environ))
  assert (ran.returncode, ran.stdout) == (2, "")
  assert ran.stderr.startswith("Error: ")
  assert says in ran.stderr
  assert ran.stderr.count("\n") == 1


@pytest.mark.slow
def test_flops_of_a_loop_are_those_of_its_steps_written_out(monkeypatch):
  """On a slice, by the compiler for TPUs, which does not note how often a loop runs."""
  pytest.importorskip("libtpu", reason="launch/requirements-tpu.txt is not installed")
  small = recipe_of({"attack.num_steps": 3, "data.batch_size": 32}, "v5e:2x2")
  devices = slices.open_devices(small.slice)
  looped = step_program.compile_step(small, devices)

  def written_out(start, end, body, value):
    for i in range(start, end):
      value = body(i, value)
    return value

  monkeypatch.setattr(attacks.jax.lax, "fori_loop", written_out)
  flat = step_program.compile_step(small, devices)
  assert looped.flops == pytest.approx(flat.flops, rel=1e-3)
  assert looped.flops_once < 0.7 * looped.flops
  assert looped.xla_flops * looped.flops / looped.flops_once == pytest.approx(
      flat.xla_flops, rel=0.1)
  assert [c["bytes"] for c in looped.collectives] == [c["bytes"] for c in flat.collectives]
