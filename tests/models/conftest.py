"""What the tests of weights share."""

import pytest

from advprop_jax.models.torch_file import read_torch_file


@pytest.fixture
def read(tmp_path):
  """Bytes -> what is read from a file of them."""
  def read_bytes(content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    return read_torch_file(path)
  return read_bytes
