"""A disk that is really full, at whatever moment: a file system in memory with little room."""

import pathlib
import shutil
import subprocess

import pytest

from tests import pods

KIB = 1024
SIZE = 3072 * KIB


@pytest.fixture
def disk(tmp_path):
  """A folder with room for 3 MiB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("needs the right to mount a file system")
  yield folder
  subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_whenever_the_disk_is_full(disk, tmp_path, processes, on_failure):
  """Fails where that is no sentence of each process, or takes a checkpoint that was whole.

  Whether a checkpoint or the metrics find it full first is chance: it prints which.
  """
  said = []
  for left in (380, 460, 540):
    workdir = disk / f"run{left}"
    command = pods.of_processes(   # tests.faulty: others wait for a save for 10 s, not for 300
        processes, workdir, "--config.train.steps=12", "--config.checkpoint.every_steps=3",
        f"--config.checkpoint.on_failure={on_failure}", module="tests.faulty")
    with pathlib.Path(disk, "fill").open("wb") as fill:
      fill.write(bytes(SIZE - left * KIB))
    output = pods.run(command, tmp_path, code=75)
    assert "Traceback" not in output, output
    assert "Fatal Python error" not in output, output
    assert "No space left on device" in output
    ends = [line for line in output.splitlines() if "Error: " in line or " is gone (" in line]
    assert len(ends) == processes, output
    said += ends
    (disk / "fill").unlink()
    step = pods.newest_step(workdir)
    output = pods.run(command, tmp_path)   # with room again
    assert f"those of the checkpoint of step {step}" in output if step else "fresh" in output
    assert pods.newest(workdir).step == 12
    shutil.rmtree(workdir)
  print(*said, sep="\n")
