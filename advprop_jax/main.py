"""AdvProp in JAX: one command for every experiment.

  python -m advprop_jax.main --config=configs/quickstart.py --workdir=DIR
"""

import atexit
import gc
import importlib
import signal
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from advprop_jax.errors import InputError
from advprop_jax.runtime import command, pod
from advprop_jax.runtime.compilation import is_compiling, keep_compiled
from advprop_jax.runtime.faults import Preempted, leave
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(); FILE.py:VARIANT passes VARIANT to it, and "
    "--config.section.field=value changes a field.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, checkpoints, metrics, results. The same command "
    "started again goes on where the run stands.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "export", "inspect", "report"],
    "train: train, then evaluate. evaluate: the checkpoint in the workdir, or "
    "--config.model.pretrained; with --config.eval.photographs=FOLDER: what these show. export: "
    "write the network for others, as --config.export.format says. inspect: a picture of what the "
    "network will see, and the speed of the data. report: figures and a "
    "page of this run, and of those that --config.report.runs names.")


def main(argv: list[str]) -> None:
  """Runs one verb on one config."""
  del argv
  for flag in (_CONFIG, _WORKDIR):
    if not flag.value:
      raise InputError(f"--{flag.name}: not given; see --help")
  logging.set_verbosity(logging.WARNING)
  # The other verbs are not loaded: the report's figures alone would take a quarter as long again.
  verb = getattr(importlib.import_module(f"advprop_jax.{_MODE.value}"), _MODE.value)
  with pod.joined():
    pod.require_same_start(_MODE.value, _CONFIG.value, _WORKDIR.value)
    verb(_CONFIG.value, _WORKDIR.value)


def run() -> None:
  """The command line: an InputError ends in its sentence and exit code, without a traceback."""
  keep_freed_memory()
  atexit.register(gc.freeze)           # or Python would look for garbage as it ends: half a second
  set_flags()
  keep_compiled()
  for stream in (sys.stdout, sys.stderr):   # names of files may be what they cannot encode
    stream.reconfigure(errors="backslashreplace")
  try:
    app.run(main, flags_parser=lambda argv: command.parse(argv, _CONFIG))
  except InputError as error:
    print(f"Error: {error}", file=sys.stderr)
    if is_compiling():
      leave(error.code)
    sys.exit(error.code)
  except Preempted as end:
    print(end, file=sys.stderr)
    if is_compiling():
      leave(0)
  except (Exception, KeyboardInterrupt) as error:
    if not is_compiling():
      raise
    traceback.print_exc()
    leave(-signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)


if __name__ == "__main__":
  run()
