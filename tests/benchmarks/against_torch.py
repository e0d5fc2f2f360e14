"""AdvProp's train step here against a PyTorch one, a few steps each in turn; asserts nothing.

  python -m tests.benchmarks.against_torch --torch=PYTHON --peer=../shared/peer/torch_advprop.py \
      --network=efficientnet_b0 --size=128 --batch=16 --cases=vanilla,pgd1,pgd5 --pairs=7

PYTHON is an interpreter with torch and timm. The peer is timed in both memory layouts, and the
faster one is compared. Float32, 1000 classes, no dropout, RMSProp, the same number of threads.
Prints one JSON line per case: medians of the turns' mean seconds of a step, and the median of the
pairs' ratios. The first step of a turn, after a pause, is not counted.
"""

import json
import statistics
import subprocess
import time

from absl import app, flags

from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags
from tests.benchmarks import step as ours

_TORCH = flags.DEFINE_string("torch", "python", "an interpreter with torch and timm")
_PEER = flags.DEFINE_string("peer", "../shared/peer/torch_advprop.py", "the PyTorch script")
_PAUSE = 0.5   # seconds before a turn: threads of the other side may spin on for a while
_PAIRS = flags.DEFINE_integer("pairs", 7, "turns of each side")
_STEPS = flags.DEFINE_integer("steps", 3, "steps of a turn that are counted")


class Peer:
  """The PyTorch step in a process of its own."""

  def __init__(self, case: str, *options: str):
    steps = "1" if case == "vanilla" else case.removeprefix("pgd")
    name = flags.FLAGS.network
    name = f"tf_{name}" if name.startswith("efficientnet") else name
    command = [_TORCH.value, "-m", "tests.benchmarks.torch_peer", _PEER.value, "--model", name,
               "--size", str(flags.FLAGS.size), "--batch", str(flags.FLAGS.batch),
               "--steps", steps, "--repeats", "1000", *options,
               *(["--vanilla"] if case == "vanilla" else [])]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     text=True, bufsize=1)

  def step(self) -> float:
    """Seconds of one step."""
    self._process.stdin.write("\n")
    return float(self._process.stdout.readline())

  def close(self) -> None:
    self._process.kill()
    self._process.wait()


def turn(step) -> float:
  """Seconds of a step, the mean of a few in a row behind one that is not counted."""
  time.sleep(_PAUSE)
  step()
  return statistics.mean(step() for _ in range(_STEPS.value))


def compare(case: str) -> dict:
  """Turns: ours, PyTorch's, PyTorch's channels last."""
  run, compiled = ours.create(case)

  def step():
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

  sides = {"plain": Peer(case), "channels_last": Peer(case, "--channels-last")}
  seconds = {"ours": [], **{name: [] for name in sides}}
  try:
    for peer in sides.values():        # which start together, and take seconds to
      peer.step()
    for _ in range(_PAIRS.value):
      seconds["ours"].append(turn(step))
      for name, peer in sides.items():
        seconds[name].append(turn(peer.step))
  finally:
    for peer in sides.values():
      peer.close()
  best = min(sides, key=lambda name: statistics.median(seconds[name]))
  ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[best], strict=True)]
  return {"case": case, "torch_layout": best, "ratio": round(statistics.median(ratios), 3),
          **{name: round(statistics.median(values), 3) for name, values in seconds.items()},
          **compiled()}


def main(argv):
  del argv
  keep_freed_memory()
  set_flags()
  for case in flags.FLAGS.cases:
    print(json.dumps({"network": flags.FLAGS.network, "size": flags.FLAGS.size,
                      "batch": flags.FLAGS.batch, **compare(case)}), flush=True)


if __name__ == "__main__":
  app.run(main)
