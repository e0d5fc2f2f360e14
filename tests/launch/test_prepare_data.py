"""The script that prepares data: what it would run, and what it says before hours of work."""

import os
import pathlib
import shlex
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "prepare_data.sh"


def prepare(*arguments, path=os.environ["PATH"]):
  return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True,
                        check=False, env={"PATH": path, "HOME": "/nowhere"})


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path):
  """Fails where a name has no command, a folder with a space is two, or something is written."""
  data = tmp_path / "some data"
  ran = prepare("--dry-run", f"--data_dir={data}", "--manual_dir=/tars", "imagenet2012",
                "imagenet_v2", "imagenet2012_corrupted", "folders", "imagenet_c")
  assert (ran.returncode, ran.stderr) == (0, "")
  commands = [shlex.split(line) for line in ran.stdout.splitlines()]
  built = [command[2] for command in commands if command[:2] == ["tfds", "build"]]
  assert built[:2] == ["imagenet2012", "imagenet_v2/matched-frequency"]
  assert len(set(built[2:])) == 75
  assert "imagenet2012_corrupted/jpeg_compression_5" in built
  assert commands[0][3:] == ["--file_format=array_record", f"--data_dir={data}",
                             "--manual_dir=/tars"]
  assert not data.exists()


@pytest.mark.parametrize(("arguments", "says"), [
  ([], "no data set is named"), (["cifar10"], "cifar10: no data set of that name"),
  (["--data=x", "folders"], "--data=x: no such option"),
  (["imagenet_a", "imagenet2012"], "ILSVRC2012_img_train.tar is not there"),
  (["imagenet2012_corrupted/fog_6"], "no data set of that name")])
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, arguments, says):
  """Fails where the second of two data sets ends the script after the first took its hours."""
  tfds = tmp_path / "tfds"
  tfds.write_text("#!/bin/sh\necho built\n")
  tfds.chmod(0o755)
  ran = prepare(f"--manual_dir={tmp_path}", *arguments, path=f"{tmp_path}:{os.environ['PATH']}")
  assert (ran.returncode, ran.stdout) == (2, "")
  assert says in ran.stderr
  assert len(ran.stderr.splitlines()) == 1


def test_class_folders_are_unpacked(tmp_path):
  """Fails where the tars in the tar stay packed, or validation images are not flat."""
  (tmp_path / "source").mkdir()
  for name in ("a.JPEG", "ILSVRC2012_val_00000001.JPEG"):
    (tmp_path / "source" / name).write_text(name)
  kit = tmp_path / "source" / "ILSVRC2012_devkit_t12"
  kit.mkdir()
  (kit / "readme.txt").write_text("")
  for name, member, mode in (("n01440764.tar", "a.JPEG", "-cf"),
                             ("ILSVRC2012_img_train.tar", "n01440764.tar", "-cf"),
                             ("ILSVRC2012_img_val.tar", "ILSVRC2012_val_00000001.JPEG", "-cf"),
                             ("ILSVRC2012_devkit_t12.tar.gz", kit.name, "-czf")):
    subprocess.run(["tar", mode, name, member], cwd=tmp_path / "source", check=True)
  ran = prepare(f"--data_dir={tmp_path}", f"--manual_dir={tmp_path / 'source'}", "folders")
  assert ran.returncode == 0, ran.stderr
  files = sorted(str(path.relative_to(tmp_path / "imagenet"))
                 for path in (tmp_path / "imagenet").rglob("*") if path.is_file())
  assert files == ["ILSVRC2012_devkit_t12/readme.txt", "train/n01440764/a.JPEG",
                   "val/ILSVRC2012_val_00000001.JPEG"]
