"""The notebook: executed from top to bottom, in short."""

import json
import os
import re

import pytest

from tests.launch.execute_notebook import NOTEBOOK, execute

WANTED = "needs pip install nbclient ipykernel"
# 20 steps in place of 625, and 75 x 8 corrupted images in place of 75 x 400.
SHORT = "--config.train.steps=20 --config.eval.corrupted_images=8"
PICTURES = 7


def outputs_of(notebook):
  return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def pictures_of(notebook):
  return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


def test_what_is_committed_is_small_and_tells_nothing_of_a_machine():
  """Fails where it was executed in part, an error is kept, or it is too large for a reader."""
  text = NOTEBOOK.read_text()
  notebook = json.loads(text)
  assert len(text) < 300_000
  assert not [output for output in outputs_of(notebook) if output["output_type"] == "error"]
  assert not re.search("/root/|/home/|site-packages", text)
  code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  if outputs_of(notebook):
    assert len(pictures_of(notebook)) == PICTURES
    assert [cell["execution_count"] for cell in code] == list(range(1, 1 + len(code)))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
  """Fails where a cell ends in an error, or shows no picture; the net is not asked for anything."""
  pytest.importorskip("nbclient", reason=WANTED)
  nbformat = pytest.importorskip("nbformat", reason=WANTED)
  pytest.importorskip("ipykernel", reason=WANTED)
  # git and pip would fetch the code and the packages; neither is wanted where both are there.
  for name in ("git", "pip"):
    (tmp_path / name).write_text("#!/bin/sh\necho asked >>\"$(dirname \"$0\")/net\"\nexit 1\n")
    (tmp_path / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  settings = next(cell for cell in notebook.cells if 'FLAGS = ""' in cell.source)
  settings.source = settings.source.replace('FLAGS = ""', f'FLAGS = "{SHORT}"').replace(
    "/tmp/advprop_notebook", str(tmp_path / "run"))
  execute(notebook)
  assert len(pictures_of(notebook)) == PICTURES
  assert not (tmp_path / "net").exists()
  said = "".join(output.get("text", "") for output in outputs_of(notebook))
  # A row of the training's table and one of the evaluation's; progress bars have the name, too.
  assert said.count("adversarial, auxiliary BN (") == 2
  assert "Error" not in said
