"""Fixtures of the tests of class folders."""

import pytest

from advprop_jax.data import file_index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """The user's cache, empty."""
  path = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(path))
  return path


@pytest.fixture
def looked_at(monkeypatch):
  """Every file that is looked at for the index, in a list that grows."""
  seen = []
  examined = file_index._examined
  monkeypatch.setattr(file_index, "_examined", lambda root, paths: (
    seen.extend(paths), examined(root, paths))[1])
  return seen
