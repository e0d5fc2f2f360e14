"""What all tests share."""

import os
import pathlib

# The tests compile much and compute little. Neither is set where the caller has set it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of references beside the checkout; tests that need it are skipped without it."""
  if not SHARED.exists():
    pytest.skip("needs the folder of references beside the checkout (../shared)")
  return SHARED
