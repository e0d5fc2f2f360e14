"""What the compiler knows of a train step: FLOPs, collectives, memory; and how long it takes.

  python -m tests.benchmarks.program --network=efficientnet_b0 --size=128 --batch=16
  python -m tests.benchmarks.program --cases=vanilla,pgd1,pgd10 --devices=8    # virtual CPU devices
  python -m tests.benchmarks.program --cases=pgd1,pgd10 --compiles=3           # the median of three

Prints one JSON line per case. FLOPs are those of the program before and after the compiler, where a
loop's body is counted once: a case of n attack steps is the one without any, and n times what one
adds. FLOPs of vanilla are 1. Asserts nothing.
"""

import json
import os
import statistics
import time

import jax
from absl import app, flags

from advprop_jax.runtime import hlo
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags
from tests.benchmarks.step import build

_DEVICES = flags.DEFINE_integer("devices", 1, "virtual CPU devices")
_COMPILES = flags.DEFINE_integer("compiles", 1, "how often each case is compiled")


def looked_at(case: str, repeats: int) -> dict:
  """Of one step: FLOPs, memory in MiB, collectives, seconds of tracing and compiling."""
  seconds = {"trace": [], "compile": []}
  for _ in range(repeats):
    jax.clear_caches()
    step, state, batch = build(case)
    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds["trace"].append(traced - start)
    seconds["compile"].append(time.perf_counter() - traced)
  memory = compiled.memory_analysis()
  return {
      "flops": (lowered.cost_analysis()["flops"], compiled.cost_analysis()["flops"]),
      "temporary_MiB": round(memory.temp_size_in_bytes / 2**20),
      "state_MiB": round(memory.argument_size_in_bytes / 2**20),
      "collectives": hlo.totals(hlo.collectives(compiled.as_text())),
      **{f"{name}_seconds": round(statistics.median(values), 1)
         for name, values in seconds.items()}}


def main(argv):
  del argv
  jax.config.update("jax_enable_compilation_cache", False)
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                             + f" --xla_force_host_platform_device_count={_DEVICES.value}")
  keep_freed_memory()
  set_flags()
  # Every number of steps has the same loop, so two cases more tell what one step adds.
  asked = [case for case in flags.FLAGS.cases if not case.endswith("-one")]
  cases = list(dict.fromkeys(["vanilla", "pgd0", *asked]))
  results = {}
  for case in cases:
    results[case] = looked_at(case, _COMPILES.value if case in asked else 1)
    flops = results[case].pop("flops")
    if case == "vanilla":
      vanilla = flops
    elif case == "pgd0":
      no_attack = flops
    else:
      steps = int(case.removeprefix("pgd"))
      flops = [base + steps * (once - base) for base, once in zip(no_attack, flops, strict=True)]
    ratios = [round(mine / theirs, 3) for mine, theirs in zip(flops, vanilla, strict=True)]
    print(json.dumps({
        "network": flags.FLAGS.network, "case": case, "devices": _DEVICES.value,
        "GFLOPs": [round(f / 1e9, 2) for f in flops], "flops_ratio": ratios,
        **results[case]}), flush=True)


if __name__ == "__main__":
  app.run(main)
