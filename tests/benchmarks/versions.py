"""The train step of this code and that of another checkout, in turns within one process.

  git worktree add /tmp/before COMMIT
  python -m tests.benchmarks.versions --before=/tmp/before --network=efficientnet_tiny --size=28 \
      --batch=64 --classes=10 --cases=vanilla,pgd1,pgd5

Two processes of one code differ by a few per cent, for as long as they run: most changes of a step
gain less. Each checkout has the step that its own tests.benchmarks.step creates. One JSON line per
case: milliseconds of a step, the median and the 10th percentile, before and now, and the ratio of
both (now / before).
"""

import importlib
import json
import pathlib
import statistics
import sys
import time

from absl import app, flags

from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags
from tests.benchmarks import step

_BEFORE = flags.DEFINE_string("before", None, "folder of the other checkout", required=True)
_SECONDS = flags.DEFINE_float("seconds", 40, "how long")

STEPS = 4       # of a turn, behind one that is not counted


def milliseconds(run) -> float:
  """What one step takes."""
  start = time.perf_counter()
  run()
  return 1e3 * (time.perf_counter() - start)


def create_of(checkout: pathlib.Path):
  """`create` of that checkout's tests.benchmarks.step, in the place of this code's."""
  for name in [name for name in sys.modules if name.partition(".")[0] in ("advprop_jax", "tests")]:
    del sys.modules[name]
  sys.path.insert(0, str(checkout))
  module = importlib.import_module("tests.benchmarks.step")
  assert checkout in pathlib.Path(module.__file__).parents, module.__file__
  return module.create


def main(argv):
  del argv
  set_flags()
  keep_freed_memory()
  cases = flags.FLAGS.cases
  now = {case: step.create(case)[0] for case in cases}
  create = create_of(pathlib.Path(_BEFORE.value).resolve())
  versions = {"now": now, "before": {case: create(case)[0] for case in cases}}
  times = {case: {version: [] for version in versions} for case in cases}
  end = time.perf_counter() + _SECONDS.value
  while time.perf_counter() < end:
    versions = dict(reversed(versions.items()))
    for case in cases:
      for version, runs in versions.items():
        runs[case]()
        times[case][version] += [milliseconds(runs[case]) for _ in range(STEPS)]
  for case in cases:
    found = {version: {"median": statistics.median(measured),
                       "p10": statistics.quantiles(measured, n=10)[0]}
             for version, measured in times[case].items()}
    print(json.dumps({
        "case": case, "steps": len(times[case]["now"]),
        **{version: {name: round(value, 2) for name, value in values.items()}
           for version, values in found.items()},
        "ratio": {name: round(found["now"][name] / found["before"][name], 3)
                  for name in ("median", "p10")}}))


if __name__ == "__main__":
  app.run(main)
