"""Runs of the network of one block in one process or in several, as their own programs."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax

from advprop_jax.experiment import Experiment, create_experiment, fresh_state
from advprop_jax.runtime.checkpoint import Checkpoints, Restored
from advprop_jax.runtime.config import default_config
from tests import one_block
from tests.conftest import ROOT

# SGD and an attack without a sign: others make of a rounding error a step of full length.
FLAGS = ["--config=configs/quickstart.py", "--config.model.name=one_block",
         "--config.data.train_split=train[:200]", "--config.data.test_split=test[:103]",
         "--config.data.batch_size=40", "--config.eval.batch_size=16",
         "--config.eval.benchmarks=clean", "--config.eval.every_epochs=0",
         "--config.optimizer.name=sgd", "--config.optimizer.schedule=constant",
         "--config.optimizer.weight_decay_form=l2", "--config.attack.norm=l2",
         "--config.train.log_every=1"]


def environment(cache: pathlib.Path, **more: str) -> dict[str, str]:
  """Variables of programs that keep what they compile in a folder.

  XLA optimises a little: of so many steps each would take longer than it saves.
  """
  return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1",
          "JAX_ENABLE_COMPILATION_CACHE": "true", "PYTHONUNBUFFERED": "1",
          "JAX_COMPILATION_CACHE_DIR": str(cache),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **more}


def local_pod(processes: int, devices: int, workdir, *flags: str, module: str = "tests.one_block",
              grace: float = 15) -> list[str]:
  """The command of a pod on this machine."""
  return [sys.executable, "launch/local_pod.py", f"--processes={processes}",
          f"--devices={devices}", f"--module={module}", f"--grace={grace}", "--",
          *FLAGS, f"--workdir={workdir}", *flags]


def single(workdir, *flags: str, module: str = "tests.one_block") -> list[str]:
  """The command of one process with one device."""
  return [sys.executable, "-m", module, *FLAGS, f"--workdir={workdir}", *flags]


def of_processes(processes: int, workdir, *flags: str, pod_flags: tuple[str, ...] = (),
                 **settings) -> list[str]:
  """The command of `single` for one process, with pod_flags too that of `local_pod` for more."""
  if processes == 1:
    return single(workdir, *flags, module=settings["module"])
  return local_pod(processes, 1, workdir, *flags, *pod_flags, **settings)


def start(command: list[str], cache: pathlib.Path, **more: str) -> subprocess.Popen:
  """Starts a program; both its streams are one pipe."""
  return subprocess.Popen(command, cwd=ROOT, env=environment(cache, **more), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 600) -> str:
  """What a program printed; an AssertionError where its exit code is another."""
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  assert process.returncode == code, f"exit code {process.returncode}: {output}"
  return output


def run(command: list[str], cache: pathlib.Path, code: int = 0, **more: str) -> str:
  """Runs a program to its end; as `finish`."""
  return finish(start(command, cache, **more), code)


def lines(workdir: pathlib.Path) -> list[dict]:
  """The whole lines of a run's metrics."""
  found = []
  with contextlib.suppress(FileNotFoundError):
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
      with contextlib.suppress(ValueError):
        found.append(json.loads(line))
  return found


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int,
                  seconds: float = 200, old_file: int | None = None) -> None:
  """Waits until a run that is being made has written the metrics of a step.

  To another file, where the number of an old one is given.
  """
  deadline = time.monotonic() + seconds
  # The file first: between the two it may be replaced by one that has no such step yet.
  while (old_file and _file_number(workdir) == old_file) or last_step(workdir) < step:
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline, f"step {step} was not reached"
    time.sleep(0.01)


def last_step(workdir: pathlib.Path) -> int:
  """The last one that has metrics; 0 for none."""
  return max((line["step"] for line in lines(workdir)), default=0)


def newest_step(workdir: pathlib.Path) -> int:
  """Of the checkpoints that have their name; 0 for none."""
  return max((int(path.name) for path in (workdir / "checkpoints").glob("*")
              if path.name.isdigit()), default=0)


@dataclasses.dataclass(frozen=True)
class Start:
  """A start, or a further one, of a run.

  Attributes:
    program: what was started.
    workdir: of the run.
    time: when, by time.monotonic().
    saved: step of the newest checkpoint that it found; 0 for none.
    old_file: number of the metrics' file, which a start that drops lines of steps that are made
      again replaces; None where there are none to be dropped.
  """

  program: subprocess.Popen
  workdir: pathlib.Path
  time: float
  saved: int
  old_file: int | None

  @classmethod
  def of(cls, command: list[str], workdir: pathlib.Path, cache: pathlib.Path, **more: str):
    """Starts a command, as `start`."""
    saved = newest_step(workdir)
    old_file = _file_number(workdir) if last_step(workdir) > saved else None
    return cls(start(command, cache, **more), workdir, time.monotonic(), saved, old_file)

  def wait_for_step(self, step: int, seconds: float = 120) -> float:
    """Waits until it has done a step itself; the seconds since the start."""
    wait_for_step(self.program, self.workdir, step, seconds, self.old_file)
    return time.monotonic() - self.time


def _file_number(workdir):
  return os.stat(workdir / "metrics.jsonl").st_ino


def children(process: subprocess.Popen) -> list[int]:
  """The processes of a pod on this machine, in their order."""
  path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  return sorted(map(int, path.read_text().split()))


def experiment_of(workdir: pathlib.Path) -> Experiment:
  """That of a run, on one device."""
  one_block.register()
  config = default_config()
  config.update(json.loads((workdir / "config.json").read_text()))
  config.model.bn_group_size = 1
  return create_experiment(config)


def newest(workdir: pathlib.Path) -> Restored:
  """The newest checkpoint of a run, made with however many devices."""
  abstract = jax.eval_shape(lambda: fresh_state(experiment_of(workdir)))
  with Checkpoints(workdir / "checkpoints", write=False) as checkpoints:
    return checkpoints.restore_latest(abstract)
