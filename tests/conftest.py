"""What all tests share."""

import atexit
import gc
import json
import os
import pathlib
import shutil
import tempfile

from tests.virtual_devices import HURRIED

# The tests compile much and compute little: XLA does not optimise, and makes fused operations in
# the older of its two ways, as for `parallel.hurried`; those of pods have the newer one, as users
# have it. None is set where the caller has set it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", HURRIED)
if not {"JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"} & set(os.environ):
  # Many run the same program; what they compile is kept for all until the last has run.
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="advprop_jax_tests_")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
import safetensors.numpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


# Of the 65,530 that Linux lets a process have. Each program of XLA for the CPU takes some, and the
# process dies of a segmentation fault where there are no more.
MANY_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Lets go of what was compiled where it is much, after a module, whose tests share programs."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of references beside the checkout; tests that need it are skipped without it."""
  if not SHARED.exists():
    pytest.skip("needs the folder of references beside the checkout (../shared)")
  return SHARED


@pytest.fixture
def published(tmp_path):
  """A function that writes weights as timm does, and gives their path."""
  from advprop_jax.models.weights import to_timm
  from tests.small_run import random_variables

  def write(classes=10, description=None, name="weights.safetensors"):
    folder = tmp_path / f"published_{classes}_{name}"
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(to_timm("one_block", random_variables(classes)), folder / name)
    if description is not None:
      (folder / "config.json").write_text(json.dumps(description))
    return str(folder / name)

  return write


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  """(config, workdir) of a run of two steps; not to be changed."""
  from advprop_jax.train import train
  from tests.small_run import make_config

  workdir = str(tmp_path_factory.mktemp("run"))
  config = make_config({"train.ema_decay": 0.5, "optimizer.learning_rate": 0.5})
  train(config, workdir)
  return config, workdir
