"""PyTorch's files, both formats, byte by byte and without PyTorch."""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile
from unittest import mock

import ml_dtypes
import numpy as np

FORMATS = ["zip", "legacy"]
MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {"f8": "Double", "f4": "Float", "f2": "Half", "bfloat16": "BFloat16", "i8": "Long",
         "i4": "Int", "i2": "Short", "i1": "Char", "u1": "Byte", "?": "Bool"}


def stand_in(module, name):
  """A class that pickles as the global of torch under this name."""
  return type(name, (), {"__module__": module})


STORAGES = {np.dtype(getattr(ml_dtypes, kind, kind)): stand_in("torch", f"{name}Storage")
            for kind, name in KINDS.items()}
REBUILD = {name: stand_in("torch._utils", name)
           for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")}
SIZE, SPARSE = stand_in("torch", "Size"), stand_in("torch._utils", "_rebuild_sparse_tensor")


class Storage:
  def __init__(self, array, key, numel=None, view=None):
    self.array, self.key, self.view = np.ascontiguousarray(array).reshape(-1), key, view
    self.numel = self.array.size if numel is None else numel


class Call:
  """Pickles as a call of any function with any arguments."""

  def __init__(self, function, *arguments):
    self.reduced = (function, arguments)

  def __reduce__(self):
    return self.reduced


def window(storage, offset, shape, strides, *more):
  """A tensor as torch.save pickles it."""
  return Call(REBUILD["_rebuild_tensor_v2"], storage, offset, shape, strides, False,
              collections.OrderedDict(), *more)


def tensor(array, key):
  array = np.asarray(array)
  strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
  return window(Storage(array, key), 0, array.shape, tuple(strides))


def dump(tree, legacy):
  """(The pickle of a tree, its storages)."""
  storages, file = {}, io.BytesIO()

  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      if not isinstance(obj, Storage):
        return None
      storages[obj.key] = obj.array
      more = (obj.view,) if legacy else ()
      return ("storage", STORAGES[obj.array.dtype], obj.key, "cpu", obj.numel, *more)

  modules = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
  for one in (*STORAGES.values(), *REBUILD.values(), SIZE, SPARSE):
    setattr(modules[one.__module__], one.__name__, one)
  with mock.patch.dict(sys.modules, modules):
    Pickler(file, protocol=2).dump(tree)
  return file.getvalue(), storages


def zip_bytes(program, storages=(), compression=zipfile.ZIP_STORED, **members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", compression) as archive:
    members = {"data.pkl": program, "byteorder": "little", "version": "3\n", **members,
               **{f"data/{key}": array.tobytes() for key, array in dict(storages).items()}}
    for name, content in members.items():
      archive.writestr(f"weights.v1/{name}", content)
  return file.getvalue()


def legacy_bytes(program, storages=(), little=True):
  system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
  head = [pickle.dumps(value, 2) for value in (MAGIC, 1001, system)]
  storages = dict(storages)
  tail = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
  return b"".join([*head, program, pickle.dumps(list(storages), 2), *tail])


def file_of(tree, kind):
  make = legacy_bytes if kind == "legacy" else zip_bytes
  return make(*dump(tree, kind == "legacy"))


def as_program(tree):
  return dump(tree, False)[0]


def assert_equal(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, strict=True)
    assert found[name].flags.c_contiguous
    assert found[name].flags.writeable
