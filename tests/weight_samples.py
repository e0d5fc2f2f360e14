"""Small files of weights, and how their refusals read."""

import struct

import numpy as np
import pytest
from safetensors.numpy import save

from advprop_jax.errors import InputError
from tests.torch_bytes import FORMATS, file_of, tensor

TENSORS = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.zeros((0, 3), "f4"),
           "c": np.array(7, "f4")}
SAFE = save(TENSORS)
HEADER = struct.unpack("<Q", SAFE[:8])[0]
TORCH = {kind: file_of({name: tensor(array, name) for name, array in TENSORS.items()}, kind)
         for kind in FORMATS}
DESCRIPTION = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return path


def assert_equal(found, expected):
  assert sorted(found) == sorted(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, strict=True)


def refusal(function, source, named=None):
  """The one sentence of the refusal, which says once which setting and which value are meant."""
  with pytest.raises(InputError) as error:
    function(source)
  message = str(error.value)
  assert len(message.splitlines()) == 1
  assert message.count("config.model.pretrained") == 1
  assert message.startswith(f"config.model.pretrained={str(source)!r}: "
                            if named is None else "config.model.pretrained: ")
  assert str(named or source) in message
  assert ";" in message, "it says what would do"
  return message
