"""PyTorch's weights without PyTorch: the state dict in a file that torch.save wrote.

Such a file is a pickle beside raw numbers, and a pickle is a program: whoever unpickles it runs
it. So nothing unpickles here. `_build` follows the instructions itself, knows the few that a state
dict is made of, and can import nothing and call only what is in `_CALLS`; its stack holds numbers,
strings, containers, tensors and inert names. Python's `pickle.Unpickler` with a `find_class` of our
own would not do: 13 bytes make it fill gigabytes, and a deep tuple as a dict's key crashes it.

Two formats. Since PyTorch 1.6, a zip file: the pickle, and one uncompressed member per storage.
Before: pickles of a magic number, the version, the system, the state dict and the list of storages,
then each storage's length and bytes. A storage is a row of numbers, a tensor a window on one.
"""

import dataclasses
import functools
import io
import math
import mmap
import os
import pickletools
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import BinaryIO

import ml_dtypes
import numpy as np

from advprop_jax.errors import InputError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_WOULD_DO = "save model.state_dict() alone, or as .safetensors"
_BIG_ENDIAN = "a big-endian machine wrote it; load and save it on another"

# Other files under such a name: (offset, the bytes there, what it is).
_OTHERS = (
    (257, b"ustar", "a tar file, as PyTorch until 0.1.10 did; load and save it with a later one"),
    (8, b"{", "a safetensors file; give it a name that ends in .safetensors"),
    (0, b"<", "a web page, as a failed download leaves it; fetch it again"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; run git lfs pull"),
    (0, b"\x1f\x8b", "compressed by gzip; unpack it"),
)

# Where training codes keep the weights, the best first: moving averages before the last step's.
_NESTED = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict",
           "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile

# Storage -> (as written, as returned).
_DTYPES = {
    "torch.DoubleStorage": ("<f8", "f8"), "torch.FloatStorage": ("<f4", "f4"),
    "torch.HalfStorage": ("<f2", "f4"), "torch.BFloat16Storage": (ml_dtypes.bfloat16, "f4"),
    "torch.LongStorage": ("<i8", "i8"), "torch.IntStorage": ("<i4", "i4"),
    "torch.ShortStorage": ("<i2", "i2"), "torch.CharStorage": ("i1", "i1"),
    "torch.ByteStorage": ("u1", "u1"), "torch.BoolStorage": ("u1", "?"),
}

_Locate = Callable[[str], slice]  # a storage's key -> where its bytes are in the file


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The state dict in a file that torch.save wrote, in the format of any PyTorch since 0.2.

  The file is only read, never run: it may come from anyone. Beside the result, only pages of the
  file are in memory, which the system can drop again.

  Args:
    path: of the file; what `state_dict_of` finds in it is taken.

  Returns:
    {name: array}, each contiguous and its own; half and bfloat16 as float32, all else as written.

  Raises:
    InputError: whatever is wrong. The file is not there, is broken or of another format, asks for
      anything but tensors, has none, or they hold more numbers together than the file has bytes
      (`expand` repeats numbers without storing them).

  Source: torch/serialization.py for both formats.
  """
  try:
    with open(path, "rb") as file:
      return _read(file)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except OSError as error:
    raise InputError(f"{path}: {error.strerror}; give a file that torch.save wrote") from error
  except Exception as error:  # Broken bytes raise a dozen kinds, from zipfile to struct and numpy.
    broken = f"it is broken or cut short ({type(error).__name__}); fetch it again"
    raise InputError(f"{path}: {broken}") from error


def state_dict_of(tree: object, leaf: type = np.ndarray) -> dict[str, np.ndarray]:
  """The state dict in what a training code saved.

  Args:
    tree: a state dict, or a dict that has one as its "state_dict_ema", "model_ema",
      "ema_state_dict", "state_dict", "model_state_dict" or "model": the first that has tensors.
      What is no tensor, such as an epoch, is ignored.
    leaf: the class of a tensor.

  Returns:
    {name: tensor}; "module." and "_orig_mod." in front of all names are taken off.

  Raises:
    InputError: there are no tensors.
  """
  nodes = [*map(tree.get, _NESTED), tree] if isinstance(tree, dict) else []
  found = next(filter(None, ({name: value for name, value in node.items()
                              if isinstance(name, str) and isinstance(value, leaf)}
                             for node in nodes if isinstance(node, dict))), None)
  if not found:
    raise InputError(f"it and its {', '.join(_NESTED)} have no tensors; save model.state_dict()")
  taken = 0
  while length := next((len(prefix) for prefix in _PREFIXES
                        if all(name.startswith(prefix, taken) for name in found)), 0):
    taken += length
  return {name[taken:]: tensor for name, tensor in found.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
  """A global that a pickle named: nothing but the name."""

  name: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
  """A row of numbers; the oldest files have views of one too, from `start`. In elements."""

  key: str
  kind: str
  start: int
  stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
  """A window that has been checked to lie in its storage; offset and strides in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
  if not os.fstat(file.fileno()).st_size:
    raise InputError("it is empty; fetch it again")
  data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  if data[:4] == b"PK\3\4":
    tree, locate = _read_zip(file, data)
  elif data[:1] == b"\x80":
    tree, locate = _read_legacy(data)
  else:
    what = next((what for at, start, what in _OTHERS if data[at:at + len(start)] == start),
                "of an unknown format; fetch it again")
    raise InputError(f"torch.save did not write it: it is {what}")
  tensors = state_dict_of(tree, _Tensor)
  numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
  if numbers > len(data):
    raise InputError(f"its tensors repeat or share {numbers} numbers; save clones of them")
  return {name: _array(tensor, data, locate) for name, tensor in tensors.items()}


def _read_zip(file: BinaryIO, data: mmap.mmap) -> tuple[object, _Locate]:
  members = {member.filename: member for member in zipfile.ZipFile(file).infolist()}
  inner = {name.partition("/")[2] for name in members}
  if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
    raise InputError(f"it is TorchScript, a program and not only weights; {_WOULD_DO}")
  roots = [name.removesuffix("data.pkl") for name in members
           if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(roots) != 1:
    raise InputError("it is a zip file of something else; give a file that torch.save wrote")

  @functools.cache  # Tensors share storages.
  def locate(key: str, folder: str = "data/") -> slice:
    return _locate_member(data, members[f"{roots[0]}{folder}{key}"])

  if f"{roots[0]}byteorder" in members and data[locate("byteorder", "")] != b"little":
    raise InputError(_BIG_ENDIAN)
  return _build(io.BytesIO(data[locate("data.pkl", "")]), {}), locate


def _locate_member(data: mmap.mmap, member: zipfile.ZipInfo) -> slice:
  """Where the bytes of a zip file's member are, once they are found to be as they were written."""
  if member.compress_type != zipfile.ZIP_STORED:
    raise InputError("it is a compressed zip file; give the file as torch.save wrote it")
  lengths = struct.unpack_from("<HH", data, member.header_offset + 26)
  start = member.header_offset + 30 + sum(lengths)
  stop = start + member.file_size
  # Zero where torch.serialization.set_crc32_options(False) skipped the checksum.
  content = memoryview(data)[start:stop]
  if len(content) != member.file_size or member.CRC not in (0, zlib.crc32(content)):
    raise InputError(f"its member {member.filename[:80]!r} is damaged; fetch it again")
  return slice(start, stop)


def _read_legacy(data: mmap.mmap) -> tuple[object, _Locate]:
  if _build(data, {}) != _MAGIC or _build(data, {}) != _VERSION:
    raise InputError(f"it is a pickle, but none that torch.save wrote; {_WOULD_DO}")
  if not _build(data, {}).get("little_endian", True):
    raise InputError(_BIG_ENDIAN)
  storages: dict[str, _Storage] = {}
  tree = _build(data, storages)
  places = {}
  for key in _build(data, {}):
    if not isinstance(key, str) or key not in storages:
      raise InputError("it lists a storage that it does not have; fetch it again")
    storage = storages[key]
    (numel,) = struct.unpack("<q", data.read(8))
    start = data.tell()
    stop = start + numel * np.dtype(_DTYPES[storage.kind][0]).itemsize
    if numel != storage.stop or stop > len(data):
      raise InputError(f"its storage {storage.key[:80]!r} is cut short; fetch it again")
    data.seek(stop)
    places[key] = slice(start, stop)
  return tree, places.__getitem__


def _array(tensor: _Tensor, data: mmap.mmap, locate: _Locate) -> np.ndarray:
  """The tensor's numbers, copied out of the file."""
  stored, returned = map(np.dtype, _DTYPES[tensor.storage.kind])
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, returned)
  place = locate(tensor.storage.key)
  if tensor.storage.stop * stored.itemsize > place.stop - place.start:
    raise InputError(f"its storage {tensor.storage.key[:80]!r} is cut short; fetch it again")
  # The stride of an axis of length one is never used, may be anything, and might not fit in int64.
  strides = [stride * stored.itemsize if length > 1 else 0
             for length, stride in zip(tensor.shape, tensor.strides, strict=True)]
  window = np.ndarray(tensor.shape, stored, data, place.start + tensor.offset * stored.itemsize,
                      strides)
  return window.astype(returned, order="C")


# The instructions that a state dict is made of: those that push something new, those that push
# their argument (two are strings of Python 2), and how many items others take: None, to the mark.
_NEW = {"NONE": types.NoneType, "NEWTRUE": lambda: True, "NEWFALSE": bool,
        "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING",
             "SHORT_BINSTRING"}
_TAKE = {"STOP": 1, "BINPERSID": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None,
         "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "REDUCE": 2, "BUILD": 1}


def _build(pickle: BinaryIO | mmap.mmap, storages: dict[str, _Storage]) -> object:
  """What one pickle builds, in a file that is then behind it; adds its storages to `storages`."""
  stack, outer, memo = [], [], {}  # a mark puts the stack aside, in `outer`
  for instruction, argument, _ in pickletools.genops(pickle):
    name = instruction.name
    count = _TAKE.get(name, 0)
    if count is None:
      items, stack = stack, outer.pop()
    else:
      items = [stack.pop() for _ in range(count)][::-1]
    match name:
      case "PROTO" | "STOP":
        pass
      case "MARK":
        outer.append(stack)
        stack = []
      case "BINPUT" | "LONG_BINPUT":
        memo[argument] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[argument])
      case "GLOBAL":
        stack.append(_named(argument.replace(" ", ".", 1)))
      case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
        stack.append(tuple(items))
      case "APPEND" | "APPENDS" if isinstance(stack[-1], list):
        stack[-1].extend(items)
      case "SETITEM" | "SETITEMS" if isinstance(stack[-1], dict):
        _update(stack[-1], zip(items[::2], items[1::2], strict=True))
      case "BUILD" if isinstance(stack[-1], dict):
        pass  # attributes of an OrderedDict, which a state dict has and nobody needs
      case "REDUCE" if isinstance(items[0], _Name) and isinstance(items[1], tuple):
        stack.append(_CALLS[items[0].name](*items[1]))
      case "BINPERSID":
        stack.append(_storage(items[0], storages))
      case _ if name in _NEW:
        stack.append(_NEW[name]())
      case _ if name in _LITERALS:
        stack.append(argument)
      case _:
        raise InputError(f"its pickle has {name} where no state dict has it; {_WOULD_DO}")
  return items[0]  # what STOP took


def _update(target: dict, items: Iterable) -> dict:
  for key, value in items:
    # No tuples: the hash of a deep one overflows the C stack.
    if not isinstance(key, str | int | float | types.NoneType):
      raise InputError(f"its pickle has a {type(key).__name__} as the key of a dict; {_WOULD_DO}")
    target[key] = value
  return target


def _named(name: str) -> _Name:
  if name not in _CALLS and name not in _DTYPES:
    raise InputError(f"it asks for {name[:80]!r}, which is no part of weights; {_WOULD_DO}")
  return _Name(name)


def _storage(identifier: object, storages: dict[str, _Storage]) -> _Storage:
  """A storage from its persistent id; what is unlike those of torch.save is refused."""
  match identifier:
    case ("storage", _Name(kind), str() as key, _, int() as numel, *view):
      start, size = view[0][1:] if view and view[0] else (0, numel)
    case _:
      raise InputError(f"its pickle refers to something other than a storage; {_WOULD_DO}")
  whole = storages.setdefault(key, _Storage(key, kind, 0, numel))
  if (kind, numel) != (whole.kind, whole.stop) or not 0 <= start <= start + size <= numel:
    raise InputError(f"its storage {key[:80]!r} has no one type and size; fetch it again")
  return _Storage(key, kind, start, start + size)


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple,
            requires_grad: bool = False, hooks: object = None, metadata: object = None) -> _Tensor:
  """The window, once it is found to lie in its storage."""
  if not len(shape) == len(strides) <= 64 or any(
      type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
    raise InputError("it has a tensor whose shape, strides or offset make no sense; fetch it again")
  last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
  if 0 not in shape and storage.start + last >= storage.stop:
    raise InputError("it has a tensor that reaches out of its storage; fetch it again")
  if metadata:
    raise InputError(f"it has a tensor with a lazy sign or conjugate; {_WOULD_DO}")
  return _Tensor(storage, storage.start + offset, shape, strides)


def _first(value: object = (), *_: object) -> object:
  """A parameter's tensor, the numbers of a torch.Size, the name of a device."""
  return value


# All that a pickle can call.
_CALLS = {
    # A dict keeps the order too; PyTorch under Python 2 gave the items as pairs.
    "collections.OrderedDict": lambda items=(): _update({}, items),
    "torch.Size": _first,
    "torch.device": _first,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
