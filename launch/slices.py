"""TPU slices: which there are, what their chips can do, and their devices without owning one.

*Source:* Google Cloud's documentation, tpu/docs/v4, v5e, v5p and v6e: peak of bfloat16 and HBM of a
chip, slice shapes. How much of the HBM a program may use is asked of the compiler itself, when it
refuses one.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from advprop_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
  """What all chips of a generation have.

  Attributes:
    hbm_bytes: memory of a chip.
    peak_flops: of a chip, bfloat16, per second.
    shapes: of its slices, chips in each dimension.
    cubes: chips of the largest slice that is built of cubes of 4 x 4 x 4, in any sorted shape whose
      sides are multiples of 4; 0 where there are no such slices.
    options: what the compiler wants to know besides the shape.
  """

  hbm_bytes: int
  peak_flops: float
  shapes: tuple[tuple[int, ...], ...]
  cubes: int = 0
  options: tuple[tuple[str, str], ...] = ()

  def has(self, shape: tuple[int, ...]) -> bool:
    """Whether there is a slice of this shape."""
    return shape in self.shapes or (
        len(shape) == 3 and all(side and side % 4 == 0 for side in shape)
        and tuple(sorted(shape)) == shape and math.prod(shape) <= self.cubes)


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
# The two cores of a chip as one device, as JAX shows them on these slices.
_ONE_DEVICE = (("chip_config_name", "megacore"),)
GENERATIONS = {
    "v4": Generation(32 * GIB, 275e12, _DEEP, 4096, _ONE_DEVICE),
    "v5e": Generation(16 * GIB, 197e12, _FLAT),
    "v5p": Generation(95 * GIB, 459e12, _DEEP, 6144),
    "v6e": Generation(32 * GIB, 918e12, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice that exists.

  Attributes:
    name: such as "v5e:16x16".
    generation: of its chips.
    shape: chips in each dimension.
  """

  name: str
  generation: Generation
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    """Number of chips, and of devices."""
    return math.prod(self.shape)


def parse_slice(name: str) -> Slice:
  """The slice of a name.

  Args:
    name: generation and shape, "v5e:4x8".

  Raises:
    InputError: there is none; the message lists those that there are.
  """
  version, _, sides = name.partition(":")
  shape = tuple(map(int, sides.split("x"))) if re.fullmatch(r"\d{1,4}(x\d{1,4})*", sides) else ()
  generation = GENERATIONS.get(version)
  if generation is None or not generation.has(shape):
    raise InputError(f"--topology={name}: there is no such slice; there is {existing(version)}")
  return Slice(name, generation, shape)


def existing(version: str = "") -> str:
  """The slices of a generation in one line; of all, where it is unknown."""
  listed = []
  for known, generation in GENERATIONS.items():
    if version in GENERATIONS and known != version:
      continue
    names = [f"{known}:{'x'.join(map(str, shape))}" for shape in generation.shapes]
    if generation.cubes:
      names.append(f"{known}:AxBxC of multiples of 4, A<=B<=C, up to {generation.cubes} chips")
    listed.append(", ".join(names))
  return "; ".join(listed)


def open_devices(slice_: Slice) -> list[jax.Device]:
  """Devices of a slice to compile for, on a machine without any; nothing can run on them.

  Raises:
    InputError: libtpu, the compiler, is not installed, or does not know the slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise InputError("libtpu, which compiles for TPUs, is not installed; "
                     "pip install -r launch/requirements-tpu.txt")
  # It would look for the TPU of this machine first, complain that there is none, and let no second
  # process use it.
  for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
                      "TPU_WORKER_HOSTNAMES": "localhost",
                      "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")
  options = dict(slice_.generation.options)
  if slice_.chips == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=slice_.name, **options).devices
  except (RuntimeError, NotImplementedError) as error:
    raise InputError(f"--topology={slice_.name}: libtpu {libtpu_version()} does not know this "
                     f"slice ({str(error).splitlines()[0]})") from error
  return list(devices)


def libtpu_version() -> str:
  """Of the installed one; "none" where there is none."""
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return "none"
