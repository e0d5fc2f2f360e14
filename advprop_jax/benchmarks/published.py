"""What is published of the paper's networks, to stand beside what is measured.

Top-1 is from the README of tensorflow/tpu, models/official/efficientnet. ImageNet-A, -R and -Sketch
of the AdvProp networks are timm's measurements of those very checkpoints (huggingface/
pytorch-image-models, results/). mCE, ImageNet-A and Stylized-ImageNet of the paper's table 3, and
its ResNets, are given as remembered and have not been checked again: ABOUT marks them.
"""

from collections.abc import Mapping
from typing import Any

ABOUT = "~"
SOURCES = (f"published: tensorflow/tpu and timm; {ABOUT}: the paper's numbers as remembered, not "
           "checked again")

_SIZES = [f"efficientnet_b{size}" for size in range(9)]


def _column(values: str) -> dict[str, str]:
  return {name: value for name, value in zip(_SIZES, values.split(), strict=True) if value != "-"}


def _about(values: Mapping[str, str]) -> dict[str, str]:
  return {name: ABOUT + value for name, value in values.items()}


# scheme -> row of the table -> network -> the number, as it is published.
_NUMBERS = {
    "vanilla": {
        "clean": {**_column("77.1 79.1 80.1 81.6 82.9 83.6 84.0 84.3 -"), **_about({
            "resnet50": "76.7", "resnet101": "78.3", "resnet152": "79.0", "resnet200": "79.3"})},
        "imagenet_c": _about(_column("70.7 - - 62.9 - 62.3 - 59.4 -")),
        "imagenet_a": _about(_column("6.7 - - 17.9 - 29.4 - 37.7 -")),
        "stylized_imagenet": _about(_column("13.1 - - 17.8 - 20.8 - 21.8 -"))},
    "advprop": {
        "clean": {**_column("77.6 79.6 80.5 81.9 83.3 84.3 84.8 85.2 85.5"), **_about({
            "resnet50": "77.4", "resnet101": "79.2", "resnet152": "79.8", "resnet200": "80.1"})},
        "imagenet_c": _about(_column("66.2 - - 57.8 - 56.2 - 52.9 -")),
        "imagenet_a": _column("5.307 8.413 10.453 17.133 25.813 34.400 40.373 45.267 46.533"),
        "imagenet_r": _column("40.397 42.883 44.813 50.110 53.113 53.943 53.607 53.313 57.873"),
        "imagenet_sketch": _column(
            "28.427 30.433 32.675 37.085 40.476 41.392 41.117 41.459 45.762"),
        "stylized_imagenet": _about(_column("14.6 - - 21.4 - 24.4 - 26.6 -"))},
}


def of(summary: Mapping[str, Any]) -> dict[str, str]:
  """{row of the table: what is published of this network and scheme}, percent or mCE.

  Empty where the classes are not ImageNet's, or nothing is published.
  """
  if not summary.get("imagenet"):
    return {}
  rows = dict(_NUMBERS.get(scheme_of(summary), {}))
  if not summary.get("imagenet_validation"):           # the test images are others
    rows.pop("clean", None)
  return {row: numbers[name] for row, numbers in rows.items()
          if (name := summary["network"].removeprefix("tf_")) in numbers}


def scheme_of(summary: Mapping[str, Any]) -> str:
  """How the measured weights were trained, "" where they do not say it.

  Published weights say it by their name: timm's end in "ap_in1k", the authors' hold "_ap-".
  """
  if summary["scheme"]:
    return summary["scheme"]
  name = summary["weights"].rsplit("/", 1)[-1]
  if "ap_in1k" in name or "_ap-" in name:
    return "advprop"
  return "vanilla" if "aa_in1k" in name or "_aa-" in name else ""
