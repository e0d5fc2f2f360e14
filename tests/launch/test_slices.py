"""Slices that exist, and what is said of others."""

import importlib.util
import math

import pytest

from advprop_jax.errors import InputError
from launch import slices


@pytest.mark.parametrize(("name", "chips"), [
  ("v5e:1x1", 1), ("v5e:16x16", 256), ("v6e:4x8", 32), ("v4:2x2x1", 4), ("v4:4x4x12", 192),
  ("v5p:16x16x24", 6144)])
def test_chips_of_a_slice(name, chips):
  assert slices.parse_slice(name).chips == chips


@pytest.mark.parametrize("name", [
  "v5e:3x5", "v5e:16x4", "v5e:32x32", "v5e:4", "v5e:", "v5e", "v4:8x4x4", "v4:4x4", "v4:6x6x6",
  "v4:16x16x24", "v4:0x4x4", "v5litepod-16", "v5e:4xfour"])
def test_what_does_not_exist_is_refused_with_what_does(name):
  """Fails where libtpu's own idea is taken: it makes slices of any even sides, of any size."""
  with pytest.raises(InputError, match=f"--topology={name}: there is no such slice; there is v"):
    slices.parse_slice(name)


def test_those_of_the_generation_are_listed():
  """And all, where the generation is unknown."""
  with pytest.raises(InputError) as refused:
    slices.parse_slice("v5e:5x5")
  listed = str(refused.value).rpartition("there is ")[2].split(", ")
  assert [slices.parse_slice(name).name for name in listed] == listed
  assert listed[-1] == "v5e:16x16"
  with pytest.raises(InputError) as refused:
    slices.parse_slice("v9:2x2")
  assert all(f"{version}:" in str(refused.value) for version in slices.GENERATIONS)


def test_without_the_compiler_a_sentence_says_how_to_get_it(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec",
                      lambda name: None if name == "libtpu" else find(name))
  with pytest.raises(InputError, match=r"libtpu.*not installed; pip install -r launch/requir"):
    slices.open_devices(slices.parse_slice("v5e:2x2"))


@pytest.mark.parametrize("version", slices.GENERATIONS)
def test_the_compiler_knows_every_slice_that_is_listed(version):
  """One device for each chip, also where a chip has two cores."""
  pytest.importorskip("libtpu", reason="launch/requirements-tpu.txt is not installed")
  for shape in slices.GENERATIONS[version].shapes:
    slice_ = slices.parse_slice(f"{version}:{'x'.join(map(str, shape))}")
    assert len(slices.open_devices(slice_)) == math.prod(shape)
