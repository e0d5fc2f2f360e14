"""PyTorch's files: what they may not ask for, and broken ones."""

import collections
import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.models.torch_file import read_torch_file
from tests.torch_bytes import (
  FORMATS,
  MAGIC,
  REBUILD,
  SPARSE,
  Call,
  Storage,
  as_program,
  assert_equal,
  dump,
  file_of,
  legacy_bytes,
  tensor,
  window,
  zip_bytes,
)

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
