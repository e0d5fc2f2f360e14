"""Times a train step: schemes, attacks, and a pass for each domain or one pass of all.

  python -m tests.benchmarks.step --network=efficientnet_tiny --size=28 --batch=128
  python -m tests.benchmarks.step --network=efficientnet_b0 --size=128 --batch=16
  python -m tests.benchmarks.step --network=resnet_tiny --size=32 --batch=80 --cases=vanilla,fast
  python -m tests.benchmarks.step --malloc        # with the C library's own way with memory
  python -m tests.benchmarks.step --network=efficientnet_b0 --size=128 --batch=16 --remat
  JAX_NUM_CPU_DEVICES=2 python -m tests.benchmarks.step   # the batch on two devices

Batch norms are of the whole batch, however many devices it is on. The cases alternate, so that a
machine whose speed drifts does so for all of them. Prints one JSON line per case: the median of
the seconds, and the median of the ratios to the first case; and, on Linux, the largest resident
size of the process while the steps ran, of all cases together.
"""

import functools
import json
import pathlib
import re
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from advprop_jax import models
from advprop_jax.method import step as step_module
from advprop_jax.method.attack import Attack
from advprop_jax.method.optimizer import create_optimizer
from advprop_jax.method.schemes import SCHEMES
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import Method, passes, train_step
from advprop_jax.runtime import parallel
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags

_NETWORK = flags.DEFINE_string("network", "efficientnet_tiny", "a name of models.NAMES")
_SIZE = flags.DEFINE_integer("size", 28, "height and width, pixels")
_BATCH = flags.DEFINE_integer("batch", 128, "images of a mini-batch; a multiple of 5 for fast")
_CLASSES = flags.DEFINE_integer("classes", 1000, "number of logits")
_DTYPE = flags.DEFINE_string("dtype", "float32", "compute type")
_REPEATS = flags.DEFINE_integer("repeats", 7, "rounds")
_CASES = flags.DEFINE_list("cases", ["vanilla", "pgd1", "pgd1-one", "pgd5"],
                           "vanilla, fast (Fast AdvProp), pgd<steps> (AdvProp), or pgd<steps>-one "
                           "(AdvProp, one pass of both domains)")
_REMAT = flags.DEFINE_bool("remat", False, "compute what is inside of blocks again")
_MALLOC = flags.DEFINE_bool("malloc", False, "leave malloc as it is")


def one_pass(scheme, model):
  """`step.passes` as it might be: all domains in one pass of the network."""
  del model
  return [[part.name for part in scheme.made]]


def build(case: str, group_size: int = 1):
  """The pmapped step of a case, a state, and a mini-batch; batch norms of so many devices."""
  scheme = SCHEMES[{"vanilla": "vanilla", "fast": "fast_advprop"}.get(case, "advprop")]
  steps, _, one = (1, "", "") if case in ("vanilla", "fast") else case[3:].partition("-")
  model = models.create_model(_NETWORK.value, _CLASSES.value, scheme.domains, dtype=_DTYPE.value,
                              axis_name=parallel.AXIS, group_size=group_size,
                              dropout_rate=0.0, drop_path_rate=0.0, remat=_REMAT.value)
  optimizer = create_optimizer("rmsprop", lambda step: 1e-4, 1e-5, momentum=0.9, rms_decay=0.9,
                               epsilon=1e-3)
  method = Method(model, scheme, Attack(num_steps=int(steps)), optimizer)
  step_module.passes = one_pass if one else passes
  state = jax.device_put(parallel.hurried(lambda: create_train_state(
      model, optimizer, 0, _SIZE.value, ema=True))(), parallel.replicated())
  rng = np.random.default_rng(0)
  batch = parallel.shard({
      "image": rng.integers(0, 256, (_BATCH.value, _SIZE.value, _SIZE.value, 3), np.uint8),
      "label": rng.integers(0, _CLASSES.value, _BATCH.value).astype(np.int32)})
  return parallel.pmap(functools.partial(train_step, method), donate_state=True), state, batch


def create(case: str):
  """A function that runs one step, and one that tells of its compiler's: seconds, memory."""
  step, state, batch = build(case, jax.local_device_count())
  start = time.perf_counter()
  step = step.lower(state, batch).compile()
  compiling = time.perf_counter() - start

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)

  def compiled():   # to be asked after the last step: the answer takes 240 MiB, and keeps them
    return {"compile_seconds": round(compiling, 1),
            "temporary_MiB": round(step.memory_analysis().temp_size_in_bytes / 2**20)}

  run()
  return run, compiled


def forget_peak() -> None:
  """Makes `peak` that of what follows, without compilers."""
  if pathlib.Path("/proc/self/clear_refs").exists():
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int | None:
  """Largest resident size of this process, MiB; None where it is not known."""
  status = pathlib.Path("/proc/self/status")
  found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
  return found and round(int(found.group(1)) / 1024)


def main(argv):
  del argv
  set_flags()
  if not _MALLOC.value:
    keep_freed_memory()
  cases = {case: create(case) for case in _CASES.value}
  seconds = {case: [] for case in cases}
  forget_peak()
  for _ in range(_REPEATS.value):
    for case, (run, _) in cases.items():
      start = time.perf_counter()
      run()
      seconds[case].append(time.perf_counter() - start)
  first, resident = seconds[_CASES.value[0]], peak()
  for case, (_, compiled) in cases.items():
    median = statistics.median(seconds[case])
    ratios = [a / b for a, b in zip(seconds[case], first, strict=True)]
    print(json.dumps({
        "network": _NETWORK.value, "size": _SIZE.value, "batch": _BATCH.value, "case": case,
        "seconds": round(median, 4), "images_per_second": round(_BATCH.value / median, 1),
        f"ratio_to_{_CASES.value[0]}": round(statistics.median(ratios), 3),
        **compiled(), "resident_MiB": resident}))


if __name__ == "__main__":
  app.run(main)
