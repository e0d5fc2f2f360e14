"""The script for Slurm, with stand-ins for srun, squeue and scontrol.

What Slurm itself does (the signals, the queue) is not tested here; launch/README.md says what was
tried with it.
"""

import os
import pathlib
import re
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"


@pytest.fixture
def cluster(tmp_path):
  """A function that runs the script with a srun of some bash, in a job of some state."""
  programs = tmp_path / "programs"
  programs.mkdir()

  def run(*arguments, srun="", state="RUNNING", **variables):
    for name, text in {"srun": f'echo "srun $*"; {srun}', "squeue": f"echo {state}",
                       "scontrol": 'echo "scontrol $*"'}.items():
      (programs / name).write_text(f"#!/bin/bash\n{text}\n")
      (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": "python3", "SLURM_JOB_ID": "41",
           "WORKDIR": str(tmp_path), **variables}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True,
                          text=True, check=False, timeout=60)

  return run


def test_arguments_reach_each_process_as_they_are(cluster, tmp_path):
  """Fails where a value with a space becomes two words."""
  (tmp_path / "summary.json").write_text("{}")
  ran = cluster("--config=c.py", f"--workdir={tmp_path}", "--config.data.dir=two  words")
  assert (ran.returncode, ran.stderr) == (0, "")
  assert (f"srun --kill-on-bad-exit=1 python3 -u -m advprop_jax.main --config=c.py "
          f"--workdir={tmp_path} --config.data.dir=two  words") in ran.stdout
  assert "scontrol" not in ran.stdout


def test_a_training_that_is_not_ended_goes_back_to_the_queue(cluster, tmp_path):
  """Fails where the end of the time is taken for the end of the training, or the other way."""
  workdir = f"--workdir={tmp_path}"
  stopped = "echo 'Stopped after step 3 of 9; resume with the same command' >&2"
  assert "scontrol requeue 41" in cluster(workdir, srun=stopped).stdout
  assert "scontrol" not in cluster(workdir, srun="echo all is done").stdout
  assert "scontrol" not in cluster(workdir, "--mode=evaluate").stdout


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
  """Fails where what a user, or Slurm itself, took away is asked for again."""
  ran = cluster(f"--workdir={tmp_path}", state="COMPLETING",
                srun="echo resume with the same command")
  assert (ran.returncode, "scontrol" in ran.stdout) == (0, False)


def test_a_crash_ends_the_job_with_its_code(cluster, tmp_path):
  """Fails where a typo in a config goes back to the queue for ever."""
  ran = cluster(f"--workdir={tmp_path}", srun="exit 2")
  assert (ran.returncode, "scontrol" in ran.stdout) == (2, False)


def test_sigterm_to_the_whole_job_is_outlived(cluster, tmp_path):
  """Fails where the script ends before the processes have saved, which Slurm would then kill."""
  save = 'kill -TERM "$PPID"; sleep 0.3; echo saved'
  ran = cluster(f"--workdir={tmp_path}", srun=save, state="COMPLETING")
  assert ran.returncode == 0
  assert "saved" in ran.stdout


@pytest.mark.parametrize(("arguments", "variables", "says"), [
  ([], {}, "--workdir=FOLDER is not given"), (["--workdir", "x"], {}, "is not given, with ="),
  (["--workdir=x"], {"PYTHON": "/nowhere/python"}, "/nowhere/python is not there"),
  (["--workdir=x"], {"SLURM_JOB_ID": ""}, "not started by Slurm")])
def test_what_is_wrong_is_said_at_once(cluster, arguments, variables, says):
  """Fails where all nodes of a job start to find out what is wrong."""
  ran = cluster(*arguments, **variables)
  assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (2, "", 1)
  assert says in ran.stderr


def test_there_is_a_process_for_each_gpu():
  """Fails where the directives disagree: JAX gives each process under Slurm one GPU."""
  directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(), re.MULTILINE))
  assert directives["ntasks-per-node"] == directives["gpus-per-node"]
  assert directives["signal"].startswith("TERM@")
  assert "gpus-per-task" not in directives
