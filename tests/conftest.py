"""What all tests share."""

import os
import pathlib

# The tests are small: fewer threads, and no search for accelerators that would not help them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of references beside the checkout; tests that need it are skipped without it."""
  if not SHARED.exists():
    pytest.skip("needs the folder of references beside the checkout (../shared)")
  return SHARED
