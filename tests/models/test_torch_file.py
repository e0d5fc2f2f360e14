"""PyTorch's files: both formats byte by byte, what they may not ask for, and broken ones."""

import collections
import io
import os
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.models.torch_file import read_torch_file, state_dict_of

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


@pytest.fixture
def read(tmp_path):
  """Bytes -> what is read from a file of them."""
  def read_bytes(content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    return read_torch_file(path)
  return read_bytes


def assert_equal(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, strict=True)
    assert found[name].flags.c_contiguous
    assert found[name].flags.writeable


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", list(STORAGES), ids=list(KINDS))
def test_numbers_of_every_type(read, kind, dtype):
  array = np.random.default_rng(0).normal(size=(2, 3, 4)) * 30
  array = array.astype("i8").astype(dtype) if dtype.kind in "iub" else array.astype(dtype)
  tree = collections.OrderedDict(a=tensor(array, "0"), b=tensor(array[1], "1"))
  tree._metadata = collections.OrderedDict({"": {"version": 1}})  # as every state dict has it
  expected = array.astype("f4") if dtype.name in ("float16", "bfloat16") else array
  assert_equal(read(file_of(tree, kind)), {"a": expected, "b": expected[1]})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_becomes_its_float32(read, dtype):
  halves = np.arange(1 << 16, dtype="u2").view(getattr(ml_dtypes, dtype, dtype))
  expected = halves.astype("f4")
  assert read(file_of({"a": tensor(halves, "0")}, "zip"))["a"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_windows_on_a_storage(read, kind):
  """Faults: strides in bytes, an offset forgotten, a storage read twice, a scalar with an axis."""
  base = np.arange(24, dtype="f4")
  storage, unused = Storage(base, "7"), 2**62
  tree = {
      "transposed": window(storage, 2, (3, 4), (1, 5)),
      "every_other": window(storage, 1, (5,), (2,)),
      "expanded": window(storage, 3, (2, 3), (0, 1)),
      "one_long": window(storage, 3, (1, 2), (unused, 1)),
      "scalar": window(storage, 23, (), ()),
      "empty": window(storage, 0, (0, 3), (3, 1)),
      "parameter": Call(REBUILD["_rebuild_parameter"], window(storage, 0, (24,), (1,)), True,
                        collections.OrderedDict()),
      "old": Call(REBUILD["_rebuild_tensor"], storage, 4, (2,), (3,)),
      "nothing": tensor(np.zeros(0, "i8"), "8"),
  }
  assert_equal(read(file_of(tree, kind)), {
      "transposed": np.array([[2 + i + 5 * j for j in range(4)] for i in range(3)], "f4"),
      "every_other": base[1:11:2],
      "expanded": np.stack([base[3:6]] * 2),
      "one_long": base[None, 3:5],
      "scalar": base[23],
      "empty": np.zeros((0, 3), "f4"),
      "parameter": base,
      "old": base[[4, 7]],
      "nothing": np.zeros(0, "i8"),
  } | {"scalar": np.array(23, "f4")})


def test_views_of_the_oldest_files(read):
  base = np.arange(8, dtype="f4")
  tree = {"a": window(Storage(base, "7", view=("9", 3, 4)), 1, (2,), (1,)),
          "b": window(Storage(base, "7"), 1, (2,), (1,))}
  assert_equal(read(file_of(tree, "legacy")), {"a": base[4:6], "b": base[1:3]})
  tree["a"] = window(Storage(base, "7", view=("9", 3, 4)), 1, (4,), (1,))
  with pytest.raises(InputError, match="reaches out of its storage"):
    read(file_of(tree, "legacy"))


def test_strings_and_pairs_of_python_2(read):
  """PyTorch under Python 2 wrote an OrderedDict as a call with its items."""
  program, storages = dump([["a", tensor(np.arange(3.0), "5")]], True)
  name = struct.pack("<I", 1) + b"a"
  assert b"X" + name in program
  program = program.replace(b"X" + name, b"U\x01a")
  program = b"\x80\x02ccollections\nOrderedDict\n" + program[2:-1] + b"\x85R."
  assert_equal(read(legacy_bytes(program, storages)), {"a": np.arange(3.0)})


@pytest.mark.parametrize("kind", FORMATS)
def test_what_training_codes_save(read, kind):
  """Moving averages come first, and nobody minds the rest."""
  one, two = np.ones(2, "f4"), np.full(3, 2, "i4")
  tree = {"epoch": 3, "args": {"lr": 0.1, "betas": (0.9, 0.99), "names": ["x", None, True]},
          "size": Call(SIZE, (2, 3)), "optimizer": {"state": {0: {"step": tensor(two, "2")}}},
          "model": {"module.a": tensor(two, "0")}, "model_ema": None,
          "state_dict": collections.OrderedDict({"module._orig_mod.a.w": tensor(one, "1"),
                                                 "module._orig_mod.b": tensor(two, "3"),
                                                 "module._orig_mod.extra": None})}
  assert_equal(read(file_of(tree, kind)), {"a.w": one, "b": two})


def test_state_dict_of():
  a, b = np.zeros(1), np.ones(2)
  assert state_dict_of({"w": a, "epoch": 3}) == {"w": a}
  assert state_dict_of({"model": {"w": a}, "state_dict_ema": {"w": b}}) == {"w": b}
  assert state_dict_of({"model": {"w": a}, "state_dict_ema": {"decay": 0.9}}) == {"w": a}
  assert state_dict_of({"model": a, "head": b}) == {"model": a, "head": b}
  assert state_dict_of({"module.w": a, "module.b": b}) == {"w": a, "b": b}
  assert state_dict_of({"module.w": a, "b": b}) == {"module.w": a, "b": b}
  assert state_dict_of({"_orig_mod.module.module.w": a}) == {"w": a}
  assert state_dict_of({"module.": a}) == {"": a}
  for tree in ({}, {"epoch": 3}, {"model": {}}, {3: a}, {"x": {"model": {"w": a}}}, [a], a, None):
    with pytest.raises(InputError, match="have no tensors"):
      state_dict_of(tree)


def as_program(tree):
  return dump(tree, False)[0]


# {name: (the pickle, or what makes one that leaves a file, what the refusal says)}.
TOUCH = "__import__('pathlib').Path.touch(__import__('pathlib').Path"
FORBIDDEN = {
    "system": (lambda left: as_program(Call(os.system, f"touch {left}")), f"'{os.name}.system'"),
    "eval": (lambda left: as_program({"a": Call(eval, f"{TOUCH}('{left}'))")}), ".eval'"),
    "new_protocol": (lambda left: pickle.dumps(Call(exec, f"{TOUCH}('{left}'))"), 4), "has FRAME"),
    "deep_inside": (lambda left: as_program(
        {"a": [({1: Call(os.system, f"touch {left}")},)]}), ".system'"),
    "sparse": (as_program({"a": Call(SPARSE, 1)}), "'torch._utils._rebuild_sparse_tensor'"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "has INST"),
    "object": (b"\x80\x02(ccollections\nOrderedDict\no.", "has OBJ"),
    "new_object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "has NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "has EXT1"),
    "text_persistent_id": (b"\x80\x02Pstorage\n.", "has PERSID"),
    "state_of_a_function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "has BUILD"),
    "state_of_a_list": (b"\x80\x02]}b.", "has BUILD"),
    "items_of_a_list": (b"\x80\x02]K\x00K\x01s.", "has SETITEM"),
    "append_to_a_dict": (b"\x80\x02}K\x00a.", "has APPEND"),
    "call_of_a_string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "has REDUCE"),
    "call_without_a_tuple": (b"\x80\x02ctorch\nSize\n]R.", "has REDUCE"),
    "call_of_a_storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "KeyError"),
    "odd_arguments": (as_program(Call(REBUILD["_rebuild_tensor_v2"], 1)), "TypeError"),
    "no_storage": (as_program({"a": window(7, 0, (1,), (1,))}), "AttributeError"),
    "module": (b"\x80\x02(X\x06\x00\x00\x00moduleNNNtQ.", "something other than a storage"),
    "number_as_id": (b"\x80\x02K\x01Q.", "something other than a storage"),
    "deep_key": (b"\x80\x02})" + 300_000 * b"\x85" + b"Ns.", "has a tuple as the key"),
    "large_memo": (b"\x80\x02Nr\xff\xff\xff\xff0.", "has POP"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", list(FORBIDDEN))
def test_nothing_but_tensors_is_built(read, tmp_path, kind, name):
  program, said = FORBIDDEN[name]
  left = tmp_path / "left"
  if callable(program):
    program = program(left)
    pickle.loads(program)
    assert left.exists(), "the program is harmless"
    left.unlink()
  with pytest.raises(InputError) as error:
    read(zip_bytes(program) if kind == "zip" else legacy_bytes(program))
  assert said in str(error.value)
  assert "weights.pth: " in str(error.value)
  assert not left.exists()


def test_deep_containers_are_no_trouble(read):
  n = 100_000
  for deep in (b"]" * n + b"N" + b"a" * n, b"}K\x00" * n + b"N" + b"s" * n, b")" + b"\x85" * n):
    with pytest.raises(InputError, match="have no tensors"):
      read(zip_bytes(b"\x80\x02" + deep + b"."))


FLOATS = np.arange(6, dtype="f4")
BAD_TENSORS = {
    "too_many": (window(Storage(FLOATS, "0"), 0, (7,), (1,)), "reaches out"),
    "behind": (window(Storage(FLOATS, "0"), 6, (1,), (1,)), "reaches out"),
    "stride": (window(Storage(FLOATS, "0"), 0, (2, 3), (4, 1)), "reaches out"),
    "negative_stride": (window(Storage(FLOATS, "0"), 5, (2,), (-1,)), "make no sense"),
    "negative_offset": (window(Storage(FLOATS, "0"), -1, (2,), (1,)), "make no sense"),
    "negative_size": (window(Storage(FLOATS, "0"), 0, (-1, -6), (1, 1)), "make no sense"),
    "float_size": (window(Storage(FLOATS, "0"), 0, (2.0,), (1,)), "make no sense"),
    "fewer_strides": (window(Storage(FLOATS, "0"), 0, (2, 3), (1,)), "make no sense"),
    "axes": (window(Storage(FLOATS, "0"), 0, (1,) * 65, (1,) * 65), "make no sense"),
    "claims_more": (window(Storage(FLOATS, "0", numel=8), 0, (8,), (1,)), "cut short"),
    "claims_negative": (window(Storage(FLOATS, "0", numel=-1), 0, (0,), (1,)), "no one type"),
    "huge": (window(Storage(FLOATS, "0"), 0, (10**9, 10**9), (0, 0)), "repeat or share"),
    "huge_empty": (window(Storage(FLOATS, "0"), 0, (2**62, 2**62, 0), (0, 0, 0)), "ValueError"),
    "conjugate": (window(Storage(FLOATS, "0"), 0, (6,), (1,), {"neg": True}), "lazy sign"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", list(BAD_TENSORS))
def test_no_number_from_outside_a_storage(read, kind, name):
  bad, said = BAD_TENSORS[name]
  with pytest.raises(InputError, match=said):
    read(file_of({"a": bad}, kind))


def test_one_storage_has_one_type(read):
  tree = {"a": tensor(FLOATS, "0"), "b": tensor(FLOATS.astype("f8"), "0")}
  with pytest.raises(InputError, match="no one type and size"):
    read(file_of(tree, "zip"))


def tar_bytes():
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
    archive.addfile(tarfile.TarInfo("sys_info"))
  return file.getvalue()


PROGRAM, CONTENT = dump({"a": tensor(FLOATS, "0")}, False)
LEGACY = file_of({"a": tensor(FLOATS, "0")}, "legacy")
NO_TENSOR = as_program({"a": 1})
OTHER_FILES = {
    "empty": (b"", "empty"),
    "web_page": (b"<!DOCTYPE html><html>", "a web page"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "gzip": (b"\x1f\x8b\x08\x00", "gzip"),
    "tar": (tar_bytes(), "tar file, as PyTorch until 0.1.10"),
    "unknown": (b"weights", "unknown format"),
    "pickle": (pickle.dumps({"a": 1}, 2), "a pickle, but none that torch.save wrote"),
    "version": (pickle.dumps(MAGIC, 2) + pickle.dumps(1002, 2), "none that torch.save wrote"),
    "big_legacy": (legacy_bytes(NO_TENSOR, little=False), "big-endian"),
    "big_zip": (zip_bytes(PROGRAM, CONTENT, byteorder="big"), "big-endian"),
    "legacy_cut": (LEGACY[:-1], "storage '0' is cut short"),
    "legacy_cut_before": (LEGACY[:-len(FLOATS.tobytes()) - 1], "broken or cut short"),
    "legacy_count": (LEGACY.replace(struct.pack("<q", 6), struct.pack("<q", 5)), "is cut short"),
    "legacy_keys": (LEGACY.replace(pickle.dumps(["0"], 2), pickle.dumps(["1"], 2)), "not have"),
    "legacy_deep_key": (LEGACY.replace(
        pickle.dumps(["0"], 2), b"\x80\x02])" + b"\x85" * 300_000 + b"a."), "not have"),
    "torchscript": (zip_bytes(PROGRAM, CONTENT, **{"constants.pkl": b"", "code/net.py": b""}),
                    "TorchScript"),
    "zip": (zip_bytes(PROGRAM).replace(b"data.pkl", b"data.txt"), "zip file of something else"),
    "compressed": (zip_bytes(PROGRAM, CONTENT, zipfile.ZIP_DEFLATED), "compressed"),
    "storage_missing": (zip_bytes(PROGRAM), "broken or cut short"),
    "damaged": (zip_bytes(PROGRAM, CONTENT).replace(FLOATS.tobytes(), (-FLOATS).tobytes()),
                "'weights.v1/data/0' is damaged"),
    "no_tensors": (zip_bytes(NO_TENSOR), "have no tensors"),
}


@pytest.mark.parametrize("name", list(OTHER_FILES))
def test_what_else_a_file_may_be_is_said(read, name):
  content, said = OTHER_FILES[name]
  with pytest.raises(InputError, match=said):
    read(content)


def test_a_checksum_that_was_not_taken(read):
  """torch.serialization.set_crc32_options(False) leaves zero in its place."""
  content = zip_bytes(PROGRAM, CONTENT)
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    checksum = archive.getinfo("weights.v1/data/0").CRC
  content = content.replace(struct.pack("<I", checksum), bytes(4))
  assert_equal(read(content), {"a": FLOATS})


def test_no_file_and_no_permission(tmp_path):
  with pytest.raises(InputError, match=r"no\.pth: No such file"):
    read_torch_file(tmp_path / "no.pth")
  with pytest.raises(InputError, match="Is a directory"):
    read_torch_file(str(tmp_path))


def broken(content, rng):
  """Some bytes changed, or the end cut off, or a piece twice."""
  at = int(rng.integers(len(content)))
  if rng.random() < 0.2:
    return content[:at]
  if rng.random() < 0.1:
    return content[:at] + content[int(rng.integers(len(content))):]
  changed = bytearray(content)
  for position in rng.integers(len(content), size=rng.integers(1, 4)):
    changed[position] = rng.integers(256) if rng.random() < 0.5 else changed[position] ^ 1
  return bytes(changed)


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_files_are_refused_or_read(read, kind):
  rng = np.random.default_rng(0)
  tree = {"epoch": 1, "model": collections.OrderedDict(
      {f"module.{i}": tensor(np.ones(i, dtype), str(i))
       for i, dtype in enumerate(("f4", "f2", "i8", "?"))})}
  content, refused = file_of(tree, kind), 0
  for _ in range(400):
    try:
      arrays = read(broken(content, rng))
    except InputError:
      refused += 1
    else:
      assert all(isinstance(array, np.ndarray) for array in arrays.values())
  assert 100 < refused < 400


def torch_examples(torch):
  """{name: what to save}."""
  network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4),
                                torch.nn.Linear(4, 5))
  base = torch.arange(24.0)
  types_ = {str(dtype): (torch.randn(3, 4) * 9).to(dtype) for dtype in (
      torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
      torch.int16, torch.int8, torch.uint8, torch.bool)}
  return {
      "network": network.state_dict(),
      "types": types_,
      "windows": {"transposed": base.reshape(4, 6).T, "part": base[3:20:2], "scalar": base[5],
                  "expanded": base[:3].expand(2, 3), "empty": torch.zeros(0, 3),
                  "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
      "shared": {"a": base, "b": base, "c": base[2:]},
      "parameters": dict(network.named_parameters()),
      "nested": {"epoch": 3, "size": base.shape, "device": torch.device("cpu"),
                 "optimizer": torch.optim.AdamW(network.parameters()).state_dict(),
                 "state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}},
  }


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False], ids=FORMATS)
def test_files_of_torch_itself(tmp_path, new):
  torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
  path = tmp_path / "weights.pth"
  for name, tree in torch_examples(torch).items():
    torch.save(tree, path, _use_new_zipfile_serialization=new)
    expected = tree.get("state_dict", tree)
    if name == "nested":
      expected = {key.removeprefix("module."): value for key, value in expected.items()}
    halves = (torch.float16, torch.bfloat16)
    assert_equal(read_torch_file(path), {
        key: (value.float() if value.dtype in halves else value).detach().contiguous().numpy()
        for key, value in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False], ids=FORMATS)
def test_what_of_torch_is_refused(tmp_path, new):
  torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
  path = tmp_path / "weights.pth"
  for tree, said in (
      ({"a": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor'"),
      ({"a": torch.zeros(3, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
      ({"a": torch.zeros(3, dtype=torch.uint16)}, "'torch._utils._rebuild_tensor_v3'|Untyped"),
      ({"a": torch.zeros(1).expand(10**6)}, "repeat or share"),
      (torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear'|something other than a storage")):
    torch.save(tree, path, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match=said):
      read_torch_file(path)
  torch.jit.script(torch.nn.Linear(2, 2)).save(path)
  with pytest.raises(InputError, match="TorchScript"):
    read_torch_file(path)
