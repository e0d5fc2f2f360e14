"""Pods that cannot start, or lose a process: one sentence, in the time that is said."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from advprop_jax.errors import InputError
from advprop_jax.runtime import pod
from launch.local_pod import free_port
from tests import pods
from tests.conftest import ROOT


def one_line(output):
  """The only line of what a process printed, JAX's own noise left out."""
  said = [line for line in output.strip().splitlines() if not line.startswith("[Gloo]")]
  assert len(said) == 1, output
  return said[0]


def start_pair(tmp_path, flags=((), ()), folders=(ROOT, ROOT), workdirs=None):
  """Two processes of a pod with flags of their own."""
  port, devices = free_port(), {"JAX_NUM_CPU_DEVICES": "1"}
  workdirs = workdirs or [tmp_path / "run"] * 2
  return [subprocess.Popen(
      [*pods.single(workdirs[index], "--config.train.steps=2", *flags[index]),
       f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={index}"],
      cwd=folders[index], env=pods.environment(tmp_path / "cache", **devices), text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for index in range(2)]


def both_refuse(processes):
  """The one sentence that both end with."""
  said = {one_line(pods.finish(process, code=2, seconds=90)) for process in processes}
  assert len(said) == 1, said
  return said.pop()


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("given", "says"), [
    (("localhost:1234", None, 0), "--processes: not given"),
    ((None, 2, 0), "--coordinator: not given"), ((None, 2, None), "--coordinator: not given"),
    (("localhost:1234", 2, None), "--process_id: not given"),
    (("localhost:1234", 2, 2), "--process_id=2: there are 2 processes; give 0 to 1"),
    (("localhost", 2, 1), "--coordinator=localhost: give HOST:PORT"),
    (("localhost:65536", 2, 1), "--coordinator=localhost:65536: give HOST:PORT"),
    (("localhost:0", 2, 0), "--coordinator=localhost:0: give HOST:PORT")])
def test_flags_that_name_no_process(given, says):
  with pytest.raises(InputError, match=re.escape(says)):
    pod.join(*given, start_timeout=1, heartbeat_timeout=10)


def joined_alone(**environment):
  """What a fresh process without flags says; in this one JAX has computed, and cannot join."""
  program = ("from advprop_jax.errors import InputError\nfrom advprop_jax.runtime import pod\n"
             "try: print(pod.join(None, None, None, 1, 10), pod.join(None, 1, None, 1, 10))\n"
             "except InputError as error: print(error)")
  return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, text=True,
                        capture_output=True, env={**os.environ, **environment}).stdout


def test_without_flags_or_an_environment_there_is_no_pod():
  assert joined_alone() == "None None\n"


def test_a_coordinator_that_does_not_answer():
  """Address and seconds are named; fails where JAX is left to abort the process."""
  port, start = free_port(), time.monotonic()
  with pytest.raises(InputError, match=rf"--coordinator=localhost:{port}: it did not answer within "
                     r"2 s \(Connection refused\)"):
    pod.join(f"localhost:{port}", 2, 1, start_timeout=2, heartbeat_timeout=10)
  assert 2 <= time.monotonic() - start < 8


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(InputError, match="process 0 cannot listen there"):
      pod.join(f"localhost:{port}", 2, 0, start_timeout=2, heartbeat_timeout=10)


def test_an_environment_that_says_half():
  """An address without processes is refused."""
  said = joined_alone(JAX_COORDINATOR_ADDRESS="localhost:1")
  assert "give --coordinator, --processes and --process_id" in said
  assert "must be called before" not in said


def test_an_environment_whose_coordinator_does_not_answer():
  """As Slurm's, for process 1 of 2: JAX's C++ aborts; address and seconds are the last words."""
  program = "from advprop_jax.runtime import pod; pod.join(None, None, None, 2, 10)"
  slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
           "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "1"}
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, text=True,
                        capture_output=True, env={**os.environ, **slurm}, timeout=120)
  assert done.returncode != 0
  assert re.search(r"the environment names \(coordinator localhost:\d+\) did not all start within "
                   "2 s", done.stderr), done.stderr


def test_processes_of_different_configs(tmp_path):
  """The field is named with both values, before anything is made."""
  said = both_refuse(start_pair(tmp_path, ([], ["--config.attack.epsilon=3"])))
  assert "process 1 differs from process 0: config.attack.epsilon: 2.0 -> 3.0" in said
  assert not (tmp_path / "run").exists()


def test_processes_of_different_code(tmp_path):
  """A comment is enough; speed fields may differ, and are not named."""
  for name in ("advprop_jax", "configs", "tests"):
    shutil.copytree(ROOT / name, tmp_path / name)
  with (tmp_path / "advprop_jax" / "train.py").open("a") as file:
    file.write("# changed\n")
  said = both_refuse(start_pair(tmp_path, ([], ["--config.data.num_threads=1"]),
                                (ROOT, tmp_path)))
  assert "process 1 differs from process 0: code of advprop_jax: " in said
  assert "num_threads" not in said


def test_a_batch_that_the_devices_do_not_divide(tmp_path):
  said = both_refuse(start_pair(tmp_path, [["--config.data.batch_size=41"]] * 2))
  assert "config.data.batch_size=41: 2 devices of 2 processes do not divide it; 40 or 42" in said


def test_a_workdir_that_is_not_shared(tmp_path):
  """As on machines with disks of their own: `run` is a link to another folder for each."""
  programs = []
  for index in range(2):
    (tmp_path / f"disk{index}").mkdir()
    folder = tmp_path / f"machine{index}"
    folder.mkdir()
    for name in ("advprop_jax", "configs", "tests"):
      (folder / name).symlink_to(ROOT / name)
    (folder / "run").symlink_to(tmp_path / f"disk{index}")
    programs.append(folder)
  said = both_refuse(start_pair(tmp_path, folders=programs, workdirs=["run", "run"]))
  assert "--workdir=run: process 1 does not see what process 0 writes there" in said


def test_modes_of_one_process(tmp_path):
  said = both_refuse(start_pair(tmp_path, [["--mode=export"]] * 2))
  assert "--mode=export: is for one process" in said


# ------------------------------------------------------------------------------------- lost


def test_last_words_are_said_when_the_process_is_gone_and_only_then(tmp_path):
  """By SIGKILL, of which the process itself knows nothing."""
  program = ("import os, sys; from advprop_jax.runtime.pod import LastWords; words = LastWords(); "
             "words.be('first'); words.be('it was killed'); words.be(*sys.argv[1:]); "
             "os.kill(os.getpid(), 9)")
  for last, said in ((["so it was"], "so it was\n"), ([""], "")):
    done = subprocess.run([sys.executable, "-c", program, *last], cwd=ROOT, check=False,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, said)


def test_it_exits_although_nobody_reads_what_it_says():
  """Fails where a pipe that is closed sends it into a shutdown that waits for the others."""
  program = ("from advprop_jax.runtime import pod; import atexit; "
             "atexit.register(lambda: print('shut down')); pod._exit(pod.LastWords(), 'gone', 3)")
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, stderr=write,
                        stdout=subprocess.PIPE, text=True)
  os.close(write)
  assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_is_killed(tmp_path, victim):
  """Within --heartbeat_timeout and a few seconds, with a sentence, and not by the launcher."""
  heartbeat = 10
  program = pods.start(
      pods.local_pod(2, 1, tmp_path / "run", "--config.train.steps=10000",
                     "--config.checkpoint.every_steps=5", f"--heartbeat_timeout={heartbeat}",
                     module="tests.slowly"), tmp_path / "cache")
  pods.wait_for_step(program, tmp_path / "run", 6)
  os.kill(pods.children(program)[victim], signal.SIGKILL)
  start = time.monotonic()
  output = pods.finish(program, code=128 + signal.SIGKILL, seconds=120)
  assert time.monotonic() - start < heartbeat + 10
  left = [line for line in output.splitlines() if line.startswith(f"[{1 - victim}] Process")]
  assert left, output
  assert "start all processes again with the same command" in left[-1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_says_nothing_more(tmp_path, victim):
  """As when its machine has lost its network: it is stopped, with its connections open.

  Fails where only a connection that breaks is noticed.
  """
  heartbeat, grace = 10, 5
  program = pods.start(
      pods.local_pod(2, 1, tmp_path / "run", "--config.train.steps=10000",
                     "--config.checkpoint.every_steps=5", f"--heartbeat_timeout={heartbeat}",
                     module="tests.slowly", grace=grace), tmp_path / "cache")
  pods.wait_for_step(program, tmp_path / "run", 6)
  os.kill(pods.children(program)[victim], signal.SIGSTOP)
  start = time.monotonic()
  output, _ = program.communicate(timeout=120)
  assert time.monotonic() - start < heartbeat + 10 + grace
  assert program.returncode in (3, 128 + signal.SIGABRT), output
  left = [line for line in output.splitlines() if line.startswith(f"[{1 - victim}] Process")]
  assert left, output
  assert "start all processes again with the same command" in left[-1]
