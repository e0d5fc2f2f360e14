"""Files of weights, whole ones and those broken in every way."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from advprop_jax.errors import InputError
from advprop_jax.models import create_model, weights
from advprop_jax.models.weight_files import find, read_tensors
from tests.weight_samples import (
  DESCRIPTION,
  HEADER,
  SAFE,
  TENSORS,
  TORCH,
  assert_equal,
  refusal,
  write,
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64"])
def test_safetensors_of_every_type(tmp_path, dtype):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  expected = {name: np.asarray(array * 0.3, dtype) for name, array in TENSORS.items()}
  path = write(tmp_path / "x.safetensors", save(expected))
  assert find(str(path)).description == {}
  assert find(str(path)).name == "x.safetensors"
  assert_equal(read_tensors(find(str(path)).tensors), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_become_a_network(tmp_path, dtype):
  name = "resnet_tiny"
  shapes = jax.eval_shape(create_model(name, 3).init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
  values = np.random.default_rng(0)
  halves = jax.tree.map(lambda leaf: values.normal(size=leaf.shape).astype(
      getattr(ml_dtypes, dtype, dtype)).astype("f4"), dict(shapes))
  published = {key: array.astype(getattr(ml_dtypes, dtype, dtype))
               for key, array in weights.to_timm(name, halves).items()}
  path = write(tmp_path / "x.safetensors", save(published))
  found = weights.from_state_dict(name, read_tensors(path))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, halves)


def test_safetensors_cut_anywhere(tmp_path):
  path = tmp_path / "x.safetensors"
  for length in range(len(SAFE)):
    write(path, SAFE[:length])
    refusal(read_tensors, path)
  write(path, SAFE + b"\0")
  refusal(read_tensors, path)


def test_safetensors_with_any_byte_wrong(tmp_path):
  """Either it can be read, or it is refused: nothing else happens."""
  path, values, refused = tmp_path / "x.safetensors", np.random.default_rng(0), 0
  for _ in range(1000):
    content = bytearray(SAFE)
    for place in values.integers(0, 8 + HEADER, values.integers(1, 4)):
      content[place] = values.integers(256)
    write(path, content)
    try:
      read_tensors(path)
    except InputError:
      refused += 1
      refusal(read_tensors, path)
  assert refused > 500


def safe(header):
  return struct.pack("<Q", len(header)) + header


ONE = b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}'
OTHER_FILES = {
    "empty": (b"", "no safetensors file, and it is empty"),
    "garbage": (bytes(range(256)) * 4, "no safetensors file"),
    "short": (b"weights", "no safetensors file"),
    "web_page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "no_json": (safe(b"{" * 99), "no whole safetensors"),
    "deep_json": (safe(b'{"a":' * 100_000), "no whole safetensors"),
    "other_json": (safe(b'{"a":1}'), "no whole safetensors"),
    "no_data": (safe(ONE % b"[1]"), "no whole safetensors"),
    "negative": (safe(ONE % b"[-1]") + b"1234", "no whole safetensors"),
    "too_large": (safe(ONE % b"[18446744073709551615,2]") + b"1234", "no whole safetensors"),
    "axes": (safe(ONE % json.dumps([1] * 65).encode()) + b"1234", "no whole safetensors"),
    "no_type": (safe(ONE.replace(b"F32", b"Q32") % b"[1]") + b"1234", "no whole safetensors"),
    "float8": (safe(ONE.replace(b"F32", b"F8_E4M3") % b"[4]") + b"1234", "no whole safetensors"),
    "no_tensors": (safe(b'{"__metadata__":{"a":"b"}}'), "have no tensors"),
    **{f"length_{length}": (struct.pack("<Q", length) + SAFE[8:], "no whole safetensors")
       for length in (0, 1, HEADER - 1, HEADER + 1, 10**8 + 1, 2**32, 2**63, 2**64 - 1)},
}


@pytest.mark.parametrize("name", list(OTHER_FILES))
def test_what_else_a_safetensors_file_may_be(tmp_path, name):
  content, said = OTHER_FILES[name]
  assert said in refusal(read_tensors, write(tmp_path / "x.safetensors", content))


@pytest.mark.parametrize("content", [SAFE, *TORCH.values()], ids=["safetensors", *TORCH])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth", "x.pt", "x"])
def test_the_content_says_what_a_file_is(tmp_path, monkeypatch, name, content):
  path = write(tmp_path / name, content)
  assert_equal(read_tensors(find(str(path)).tensors), TENSORS)
  monkeypatch.chdir(tmp_path)
  assert_equal(read_tensors(f"./{name}"), TENSORS)


def test_refusals_of_torch_files_name_the_file_once(tmp_path, monkeypatch):
  path = write(tmp_path / "x.pth", b"weights")
  assert "torch.save did not write it" in refusal(read_tensors, path)
  assert str(path) not in refusal(read_tensors, path).partition(": ")[2]
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=r"^config.model.pretrained='x.pth': torch.save did not"):
    read_tensors("./x.pth")


def test_what_cannot_be_read(tmp_path):
  assert "No such file" in refusal(read_tensors, tmp_path / "x.safetensors")
  assert "directory" in refusal(read_tensors, tmp_path)


# ---- a path

@pytest.mark.parametrize(("name", "content"), [("model.safetensors", SAFE),
                                               ("pytorch_model.bin", TORCH["zip"])])
def test_folder_as_the_hub_has_it(tmp_path, name, content):
  folder = tmp_path / "weights"
  write(folder / name, content)
  assert find(str(folder)).description == {}
  write(folder / "config.json", json.dumps(DESCRIPTION).encode())
  for source in (folder, folder / name):
    found = find(str(source))
    assert (found.tensors, found.name, found.description) == (folder / name, name, DESCRIPTION)
    assert_equal(read_tensors(found.tensors), TENSORS)


def test_safetensors_come_first(tmp_path):
  write(tmp_path / "pytorch_model.bin", b"")
  path = write(tmp_path / "model.safetensors", SAFE)
  assert find(str(tmp_path)).tensors == path


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_description(tmp_path, content):
  write(tmp_path / "model.safetensors", SAFE)
  description = write(tmp_path / "config.json", content)
  assert "is no JSON" in refusal(find, str(tmp_path), named=description)


def test_description_of_something_else(tmp_path):
  write(tmp_path / "model.safetensors", SAFE)
  write(tmp_path / "config.json", b"[1]")
  assert find(str(tmp_path)).description == {}


def test_paths_without_weights(tmp_path):
  assert "model.safetensors or pytorch_model.bin" in refusal(find, str(tmp_path))
  for source in (str(tmp_path / "nothing"), str(tmp_path / "nothing.safetensors"), "./nothing",
                 "../nothing/at.all", "owner/nothing.pth", "nothing", "a\0b",
                 "https://huggingface.co/owner/name"):
    with pytest.raises(InputError, match="there is no such file, and it is no id") as error:
      find(source)
    assert f"config.model.pretrained={source!r}: " in str(error.value)
  assert "cannot be looked for (File name too long)" in refusal(find, "x" * 5000)


def test_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  path = write(tmp_path / "weights" / "model.safetensors", SAFE)
  assert find("~/weights").tensors == find("~/weights/model.safetensors").tensors == path
  assert "no such file" in refusal(find, "~/nothing.safetensors")
  assert "home directory" in refusal(find, "~nobody_of_that_name/weights")
