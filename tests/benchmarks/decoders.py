"""Times ways to decode and to scale, and what each costs in fidelity; asserts nothing.

    python -m tests.benchmarks.decoders [--photos=FOLDER_OF_JPEGS] [--repeats=15]

Milliseconds of CPU time per JPEG (quality 90, 4:2:0, by default made up), medians over the repeats,
in which all ways take turns; and grey levels from what Pillow gives, mean and largest. OpenCV is
measured where it is installed; it is no requirement.

Measured with --photos and 20 photographs of ImageNet, on two cores of an AMD EPYC that other work
shared (load 5); simplejpeg 1.9.0, cykooz-resizer 4.0.1, Pillow 13.0.0, OpenCV 5.0.0. OpenCV has no
antialiased bicubic: INTER_AREA is a box, INTER_CUBIC has no antialiasing. cykooz-resizer and Pillow
differ in the order of columns and rows: both are .29 levels from the filter's exact values. The
last table is of photographs of 512 x 512: scaled from a smaller decoding, and from the whole one.

    decode 500 x 375                      ms   mean  largest
    ---------------------------------  -----  -----  -------
    Pillow                             0.852      0        0
    here                               0.606      0        0
    here, half                         0.512      -        -
    here, quarter                       0.46      -        -
    simplejpeg, fastdct, fastupsample  0.556  1.332       52
    OpenCV                             0.627      0        0

    decode 2000 x 1500                    ms   mean  largest
    ---------------------------------  -----  -----  -------
    Pillow                             23.19      0        0
    here                               5.903      0        0
    here, half                         4.403      -        -
    here, quarter                      3.765      -        -
    simplejpeg, fastdct, fastupsample  5.051  1.006       27
    OpenCV                             6.268      0        0

    scale 330 x 325 to 224 x 224        ms   mean  largest
    -------------------------------  -----  -----  -------
    Pillow, bicubic                  0.944      0        0
    here (cykooz-resizer, bicubic)   0.182  0.183        7
    Pillow, bicubic, reducing_gap 1  0.946      0        0
    Pillow, bilinear                 0.613  1.493       34
    OpenCV, INTER_AREA                0.46  1.019       20
    OpenCV, INTER_CUBIC              0.215  2.188       80

    decoded to  times the pixels needed   mean  largest
    ----------  -----------------------  -----  -------
    1/2                               1  1.768       46
    1/4                               1  1.834       41
    1/8                               1  1.999       31
    1/2                             1.5  1.099       27
    1/4                             1.5  1.309       22
    1/8                             1.5   1.57       25
    1/2                               2  0.673       16
    1/4                               2  0.839       13
    1/8                               2  0.973       11
    1/2                               3  0.329        9
    1/4                               3  0.422        6
    1/8                               3  0.462        5
"""

import argparse
import os
import statistics
import time

import numpy as np
from PIL import Image

from advprop_jax.data import decode, transforms
from advprop_jax.runtime.metrics import table
from tests.photographs import jpegs, opened

SIZE = 224
PART = (20, 15, 330, 325)              # top, left, height, width of what is scaled to SIZE


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--photos", help="a folder of JPEGs")
  parser.add_argument("--repeats", type=int, default=15)
  args = parser.parse_args()
  print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
  files = jpegs(args.photos)
  large = jpegs(args.photos, height=1500, width=2000)
  for name, some in (("500 x 375", files), ("2000 x 1500", large)):
    print("\n" + compared(f"decode {name}", decoders(), some, args.repeats))
  top, left, height, width = PART
  parts = [decode.decode(file)[top:top + height, left:left + width] for file in files]
  print("\n" + compared(f"scale {height} x {width} to {SIZE} x {SIZE}", scalers(), parts,
                        args.repeats))
  print("\n" + smaller_decodings(jpegs(args.photos, height=512, width=512)))


def compared(title: str, ways: dict, inputs: list, repeats: int) -> str:
  """A table of ways to do the same; the first is what the others are compared with."""
  milliseconds = {name: [] for name in ways}
  for _ in range(repeats):
    for name, way in ways.items():
      start = time.process_time()
      for each in inputs:
        way(each)
      milliseconds[name].append((time.process_time() - start) / len(inputs) * 1e3)
  rows, first = [], next(iter(ways.values()))
  for name, way in ways.items():
    results = [(np.asarray(way(each)).astype(int), np.asarray(first(each))) for each in inputs]
    same = results[0][0].shape == results[0][1].shape
    errors = [np.abs(result - expected) for result, expected in results] if same else []
    rows.append([name, round(statistics.median(milliseconds[name]), 3),
                 round(float(np.mean([error.mean() for error in errors])), 3) if same else None,
                 max(int(error.max()) for error in errors) if same else None])
  return table(rows, [title, "ms", "mean", "largest"])


def decoders() -> dict:
  """name -> (bytes -> pixels)."""
  ways = {"Pillow": lambda file: np.asarray(opened(file)),
          "here": decode.decode,
          "here, half": lambda file: decode.decode_at_least(file, 1 / 2)[0],
          "here, quarter": lambda file: decode.decode_at_least(file, 1 / 4)[0]}
  if decode.simplejpeg:
    ways["simplejpeg, fastdct, fastupsample"] = lambda file: decode.simplejpeg.decode_jpeg(
        file, fastdct=True, fastupsample=True)
  try:
    import cv2
  except ImportError:
    return ways
  cv2.setNumThreads(0)
  return ways | {"OpenCV": lambda file: cv2.imdecode(
      np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)}


def scalers() -> dict:
  """name -> (pixels -> pixels)."""
  def by_pillow(filter_, **settings):
    return lambda image: Image.fromarray(image).resize((SIZE, SIZE), filter_, **settings)

  ways = {"Pillow, bicubic": by_pillow(Image.Resampling.BICUBIC),
          "here (cykooz-resizer, bicubic)": lambda image: transforms.resize(image, SIZE),
          "Pillow, bicubic, reducing_gap 1": by_pillow(Image.Resampling.BICUBIC, reducing_gap=1),
          "Pillow, bilinear": by_pillow(Image.Resampling.BILINEAR)}
  try:
    import cv2
  except ImportError:
    return ways
  cv2.setNumThreads(0)
  for name in ("INTER_AREA", "INTER_CUBIC"):
    ways[f"OpenCV, {name}"] = lambda image, name=name: cv2.resize(
        image, (SIZE, SIZE), interpolation=getattr(cv2, name))
  return ways


def smaller_decodings(files: list[bytes]) -> str:
  """How far bicubic scaling of a smaller decoding is from that of the whole, in grey levels."""
  rows = []
  for left in (1, 1.5, 2, 3):
    for factor in (2, 4, 8):
      errors = []
      for file in files:
        whole = decode.decode(file)
        side = min(whole.shape[:2])
        size = round(side / factor / left)
        smaller, _ = decode.decode_at_least(file, 1 / factor)
        results = [transforms.resize(image, size, (0, 0, side / scale, side / scale)).astype(int)
                   for image, scale in ((whole, 1), (smaller, factor))]
        errors.append(np.abs(results[0] - results[1]))
      rows.append([f"1/{factor}", left, round(float(np.mean([e.mean() for e in errors])), 3),
                   max(int(error.max()) for error in errors)])
  return table(rows, ["decoded to", "times the pixels needed", "mean", "largest"])


if __name__ == "__main__":
  main()
