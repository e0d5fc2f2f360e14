"""The command line: what a user can get wrong ends in one sentence and exit code 2."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def command(*flags, env=None):
  return subprocess.run([sys.executable, "-m", "advprop_jax.main", *flags], cwd=ROOT, text=True,
                        capture_output=True, check=False, env={**os.environ, **(env or {})})


QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize(("flags", "says"), [
    ([], ["--config", "not given"]),
    ([QUICKSTART], ["--workdir", "not given"]),
    ([QUICKSTART, "--workdir=DIR", "--config.attack.epsilom=2"], ["epsilom", "epsilon"]),
    ([QUICKSTART, "--workdir=DIR", "--config.attack.num_steps=many"], ["num_steps=many", "int"]),
    ([QUICKSTART, "--workdir=DIR", "--config.attack.epsilon=-1"], ["config.attack.epsilon=-1"]),
    (["--config=configs/quickstart.py:scheme=advprob", "--workdir=DIR"],
     ["'scheme=advprob'", "scheme=advprop|vanilla"]),
    ([QUICKSTART, "--workdir=DIR", "--config.scheme=advprob"],
     ["config.scheme='advprob'", "did you mean 'advprop'"]),
    (["--config=configs/imagenet_efficientnet.py:b9", "--workdir=DIR"], ["b9", "b0"]),
    (["--config=configs/nothing.py", "--workdir=DIR"], ["configs/nothing.py"]),
    ([QUICKSTART, "--workdir=DIR", "--mode=dance"], ["mode", "train"]),
    ([QUICKSTART, "--workdir=DIR", "--mode=report"], ["DIR", "there is no such folder"]),
    ([QUICKSTART, "--workdir=DIR", "--config.data.name=mnist", "--config.data.dir=DIR"],
     ["data.dir", "DIR"]),
    ([QUICKSTART, "--workdir=DIR", "--config.data.name=folder", "--config.data.dir=DIR"],
     ["data.dir='DIR' does not exist", "train/CLASS/"]),
    ([QUICKSTART, "--workdir=DIR", "--config.data.test_split=dev"], ["dev", "test"]),
    ([QUICKSTART, "--workdir=DIR", "--config.data.dir=DIR"], ["data.dir", "data.name"]),
    ([QUICKSTART, "--workdir=DIR", "--config.attack.epsilon=inf"], ["config.attack.epsilon=inf"]),
    ([QUICKSTART, "--workdir=/dev/null/run"], ["--workdir=/dev/null/run", "can be written"]),
])
def test_bad_input(flags, says, tmp_path):
  flags = [flag.replace("DIR", str(tmp_path / "run")) for flag in flags]
  done = command(*flags)
  assert done.returncode == 2, done.stderr
  message = done.stderr.strip().splitlines()
  assert "Traceback" not in done.stderr
  assert len(message) == 1, message
  for text in says:
    assert text.replace("DIR", str(tmp_path / "run")) in message[0]


def test_bad_input_leaves_no_workdir(tmp_path):
  command(QUICKSTART, f"--workdir={tmp_path / 'run'}", "--config.attack.epsilon=-1")
  assert not (tmp_path / "run").exists()


# A training that ends while a program is compiled, for a minute.
COMPILING = """
import sys, time
from advprop_jax import main, train
from advprop_jax.errors import InputError
from advprop_jax.runtime import compilation
from advprop_jax.runtime.faults import Preempted
def ends(config, workdir):
  compilation._beside(lambda give: time.sleep(60))
  assert compilation.is_compiling()
  print("before", end="")
  raise {error}
train.train = ends
sys.argv = ["main", "--config=configs/quickstart.py", "--workdir=DIR"]
main.run()
"""


@pytest.mark.parametrize(("error", "code", "says"), [
    ("InputError('the sentence')", 2, "Error: the sentence"),
    ("Preempted('the end')", 0, "the end"),
    ("ValueError('a fault')", 1, "ValueError: a fault"),
    ("KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt")])
def test_what_ends_a_start_does_not_wait_for_the_compiler(error, code, says):
  """Fails where the prompt comes back when the compiler has done, or a second Ctrl-C aborts."""
  done = subprocess.run([sys.executable, "-c", COMPILING.format(error=error)], cwd=ROOT, text=True,
                        capture_output=True, check=False, timeout=50)
  assert (done.returncode, done.stdout) == (code, "before")
  assert done.stderr.strip().splitlines()[-1] == says
  assert ("Traceback" in done.stderr) == (code not in (0, 2))


def test_a_training_loads_no_figures():
  """Fails where each start waits for matplotlib or scipy.io, which few need."""
  done = subprocess.run(
      [sys.executable, "-c", "import sys; from advprop_jax import main, train; "
       "print({'matplotlib', 'scipy.io'} & set(sys.modules))"],
      cwd=ROOT, text=True, capture_output=True, check=True)
  assert done.stdout == "set()\n"


def test_no_garbage_is_looked_for_at_the_end():
  """Fails where Python goes through all objects once more as it ends."""
  program = ("import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 999)); "
             "from advprop_jax import main; sys.argv = ['main', '--workdir=DIR']; main.run()")
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True,
                        check=False)
  assert (done.returncode, done.stdout) == (2, "True\n"), done.stderr


def test_help():
  done = command("--help")
  assert "--workdir" in done.stdout + done.stderr


def test_tensorflow_is_not_needed(tmp_path):
  """A package of that name that cannot be imported changes nothing."""
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('TensorFlow wanted')")
  program = ("from advprop_jax import evaluate, train; from advprop_jax.data import sources; "
             "print(len(sources.open_source('bundled', split='test')))")
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True,
                        check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
  assert done.stdout.strip() == "2000", done.stderr
