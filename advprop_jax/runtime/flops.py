"""FLOPs of a compiled program in which what is in a loop counts as often as it runs.

XLA's own number, `Compiled.cost_analysis()["flops"]`, has the body of each loop once, and every
addition of two arrays too. This one has convolutions and matrix products alone, which is what a
chip's peak is about.
"""

import dataclasses
import math
import re

import numpy as np

from advprop_jax.runtime import hlo


@dataclasses.dataclass(frozen=True)
class Flops:
  """Floating point operations of convolutions and matrix products, two for a multiply-add.

  Attributes:
    total: of one run of the program on one device.
    once: the same with the body of each loop once, to be compared with XLA's own number.
    unknown_loops: whether there were some in a loop that does not say how often it runs; it counts
      once then.
  """

  total: int
  once: int
  unknown_loops: bool = False

  @property
  def correction(self) -> float:
    """How many times more it is than with the body of each loop once."""
    return self.total / self.once if self.once else 1.0


def count(text: str) -> Flops:
  """FLOPs of a compiled program, by its text, `Compiled.as_text()`.

  Raises:
    ValueError: the text is not that of a program.
  """
  total, once, unknown = 0, 0, False
  for visit in hlo.visits(hlo.parse(text)):
    flops = _of(visit)
    once += flops
    total += flops * (1 if visit.times is None else visit.times)
    unknown |= bool(flops) and visit.times is None
  return Flops(total, once, unknown)


def _of(visit: hlo.Visit) -> int:
  instruction = visit.instruction
  if instruction.opcode not in ("convolution", "dot"):
    return 0
  lhs, rhs = map(hlo.shape, visit.operand_types)
  result, attributes = hlo.shape(instruction.type), instruction.attributes
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes).group(1)
    summed = [lhs[int(axis)] for axis in contracted.split(",") if axis]
    return 2 * math.prod(result) * math.prod(summed)
  return 2 * _multiply_adds(lhs, rhs, result, attributes)


def _multiply_adds(lhs, rhs, result, attributes) -> int:
  """Of a convolution; those with the zeros of padding and dilation are not counted.

  *Source:* openxla/xla, xla/service/hlo_cost_analysis.cc, GetConvolutionFlops.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
  groups, batch_groups = (int(_attribute(attributes, name, "1"))
                          for name in ("feature_group_count", "batch_group_count"))
  products = (lhs[labels[0].index("f")] // groups * result[labels[2].index("f")]
              * (lhs[labels[0].index("b")] // batch_groups))
  window = re.search(r"window=\{([^}]*)\}", attributes)
  for axis in sorted(set(labels[0]) - set("bf")):
    products *= _valid(lhs[labels[0].index(axis)], rhs[labels[1].index(axis)],
                       result[labels[2].index(axis)], window.group(1) if window else "", int(axis))
  return products


def _valid(size: int, kernel: int, outputs: int, window: str, axis: int) -> int:
  """Pairs of a kernel's place and an output's, along one axis, that meet a value of the input."""
  def of_axis(name, default):
    found = re.search(rf"\b{name}=(\S+)", window)
    return found.group(1).split("x")[axis] if found else default

  stride, base, dilation = (int(of_axis(name, "1"))
                            for name in ("stride", "lhs_dilate", "rhs_dilate"))
  padding = int(of_axis("pad", "0_0").split("_")[0])
  places = (np.arange(outputs)[:, None] * stride - padding
            + np.arange(kernel)[None, :] * dilation)
  return int(np.sum((places % base == 0) & (places >= 0) & (places // base < size)))


def _attribute(attributes: str, name: str, default: str) -> str:
  found = re.search(rf"\b{name}=(\w+)", attributes)
  return found.group(1) if found else default
