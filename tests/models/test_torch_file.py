"""PyTorch's files: what is read of both formats, and of PyTorch itself."""

import collections
import struct

import ml_dtypes
import numpy as np
import pytest

from advprop_jax.errors import InputError
from advprop_jax.models.torch_file import read_torch_file, state_dict_of
from tests.torch_bytes import (
  FORMATS,
  KINDS,
  REBUILD,
  SIZE,
  STORAGES,
  Call,
  Storage,
  assert_equal,
  dump,
  file_of,
  legacy_bytes,
  tensor,
  window,
)


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
