"""Plans a run on a TPU slice without owning one: memory, FLOPs, collectives, days.

  pip install -r requirements.txt -r launch/requirements-tpu.txt
  python launch/plan.py --config=configs/imagenet_efficientnet.py:b7 --topology=v5e:16x16
  python launch/plan.py --config=configs/imagenet_resnet.py:50 --topology=v4:2x2x2 --json

Compiles the very train step for that slice, on this machine's CPU, from shapes alone: no TPU, no
network, no data. Where the step does not fit in the chips' memory, smaller micro-batches are tried.
A compilation takes minutes; its results are kept, and the same command prints them at once.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

ROOT = str(pathlib.Path(__file__).resolve().parents[1])
if ROOT not in sys.path:               # started as a script, only its own folder is
  sys.path.insert(0, ROOT)

from advprop_jax.errors import InputError  # noqa: E402
from advprop_jax.runtime import command  # noqa: E402
from launch import fitting, plan_report, slices, step_program  # noqa: E402
from launch.recipe import make_recipe, with_chips  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file of training; FILE.py:VARIANT passes VARIANT to it, "
    "--config.section.field=value changes a field. Where it has a choice of chips, those of the "
    "slice are chosen.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, such as v5e:16x16 or v4:4x4x4.")
_CLASSES = flags.DEFINE_integer("classes", None, "Classes of the data; known for ImageNet.")
_IMAGES = flags.DEFINE_integer("images", None, "Images to train on; known for ImageNet.")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.2, "Share of the chips' peak that training reaches, for the days. An "
    "assumption: nothing here has measured it.", lower_bound=1e-3, upper_bound=1.0)
_JSON = flags.DEFINE_bool("json", False, "Print JSON, with all numbers and collectives.")
_SEARCH = flags.DEFINE_bool("search", True, "Try smaller micro-batches where the step does not "
                            "fit; --nosearch compiles the config's own alone.")
_KEPT = flags.DEFINE_bool("kept", True, "Take results that were kept; --nokept compiles again.")
_HLO = flags.DEFINE_string("hlo", None, "File for the text of the last compiled program.")

DOES_NOT_FIT = 1                       # exit code


def main(argv: list[str]) -> int:
  """Compiles, and prints the plan."""
  del argv
  for flag in (_CONFIG, _TOPOLOGY):
    if not flag.value:
      raise InputError(f"--{flag.name}: not given; see --help")
  logging.set_verbosity(logging.WARNING)
  slice_ = slices.parse_slice(_TOPOLOGY.value)
  recipe = make_recipe(_CONFIG.value, slice_, _CLASSES.value, _IMAGES.value)
  devices = slices.open_devices(slice_)
  folder = step_program.cache_folder()

  def attempt(recipe):
    compiled = step_program.cached(recipe, folder) if _KEPT.value and not _HLO.value else None
    if compiled is not None:
      return fitting.Attempt(recipe, compiled, was_kept=True)
    print(f"Compiling for {slice_.name}, which takes minutes: {fitting.describe(recipe)}",
          file=sys.stderr, flush=True)
    compiled = step_program.compile_step(recipe, devices, _HLO.value)
    step_program.keep(recipe, compiled, folder)
    return fitting.Attempt(recipe, compiled)

  attempts = fitting.fit(recipe, attempt, _SEARCH.value)
  if _JSON.value:
    print(json.dumps(plan_report.as_json(attempts, _UTILISATION.value), indent=2))
  else:
    print(plan_report.text(attempts, _UTILISATION.value))
  return 0 if attempts[-1].compiled.fits else DOES_NOT_FIT


def run() -> None:
  """The command line: bad input ends in one sentence and exit code 2, without a traceback."""
  try:
    app.run(main, flags_parser=lambda argv: command.parse(argv, _CONFIG, with_chips))
  except InputError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(error.code)


if __name__ == "__main__":
  run()
