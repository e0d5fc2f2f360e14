"""Executes launch/colab.ipynb and keeps its outputs in it, made small.

  pip install nbclient ipykernel
  python -m tests.launch.execute_notebook
"""

import base64
import io
import pathlib
import re
import time

from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
COLOURS = 96        # of a picture, as committed
TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def execute(notebook, timeout: float = 1800) -> None:
  """Executes a notebook in place, from launch/, as Jupyter would, by the Python that runs this."""
  import nbclient

  nbclient.NotebookClient(notebook, timeout=timeout, kernel_name="python3",
                          resources={"metadata": {"path": str(ROOT / "launch")}}).execute()


def shrink(notebook) -> None:
  """Leaves of each output what somebody reads: the end of a progress bar, pictures of few colours.
  """
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)
    if cell.cell_type != "code":
      continue
    cell.outputs = joined(cell.outputs)
    for output in cell.outputs:
      if output.output_type == "stream":
        output.text = last_states(output.text)
      elif "image/png" in output.get("data", {}):
        output.data = {"image/png": few_colours(output.data["image/png"])}
    cell.outputs = [output for output in cell.outputs if output.get("text", "x").strip()]


def last_states(text: str) -> str:
  """Each line as a terminal shows it in the end: what stands behind its last carriage return."""
  lines = TERMINAL.sub("", text).replace("\r\n", "\n").split("\n")
  return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def joined(outputs: list) -> list:
  """Streams that follow each other, as one."""
  result = []
  for output in outputs:
    last = result[-1] if result else None
    if last and output.output_type == last.output_type == "stream" and output.name == last.name:
      last.text += output.text
    else:
      result.append(output)
  return result


def few_colours(png: str) -> str:
  """A picture, base64, with a palette."""
  image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
  file = io.BytesIO()
  image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def main() -> None:
  import nbformat

  notebook, start = nbformat.read(NOTEBOOK, as_version=4), time.perf_counter()
  execute(notebook)
  shrink(notebook)
  nbformat.write(notebook, NOTEBOOK)
  print(f"{time.perf_counter() - start:.0f} s, {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
