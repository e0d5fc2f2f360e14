"""Where a train step's time goes: its longest operations, those that are slow, its time by layer.

  python -m tests.benchmarks.profile --network=efficientnet_b0 --size=128 --batch=16 --cases=pgd5

Runs a few steps under jax.profiler. Milliseconds of a step are those that one thread spent in an
operation; XLA's threads share most operations, and all finish at nearly the same time. A
convolution that XLA does not give to its fast routine runs on threads that the profiler does not
see: `untraced`.

Slow is what takes longer than memory needs for what the operation reads and writes, matrix products
and convolutions aside: a sum, say, that is added up again for each number of the result.
"""

import collections
import pathlib
import re
import tempfile

import jax
from absl import app, flags

from advprop_jax.runtime import hlo
from advprop_jax.runtime.memory import keep_freed_memory
from advprop_jax.runtime.xla_flags import set_flags
from tests.benchmarks.step import build

_TOP = flags.DEFINE_integer("top", 10, "operations to be printed")
_MEMORY = flags.DEFINE_float("memory", 45, "what memory gives, GB/s, to tell which are slow")
_STEPS = flags.DEFINE_integer("steps", 5, "steps to be profiled")

PRODUCTS = ("dot_general", "conv_general_dilated", "transpose")
CONTAINERS = ("while", "conditional", "call", "cond")   # their time is that of what is in them
LAYERS = {"squeeze_excite": "squeeze and excite", "depthwise/": "depthwise",
          "stem/": "stem's convolution", "channel_sums": "batch norm and activation",
          "branch_0_fun/dot_general": "convolution", "dot_general": "1 x 1",
          "conv_general": "convolution",
          "norm": "batch norm and activation", "/mul": "batch norm and activation"}


def operations(text: str) -> dict[str, tuple[str, str]]:
  """{operation: (shape of its result, where it stands in the code)} of a compiled program."""
  pattern = r'^\s*(?:ROOT )?%?([\w.\-]+) = (\S+?)[{ ].*?op_name="([^"]*)"'
  return {name: (shape, place) for name, shape, place in re.findall(pattern, text, re.MULTILINE)}


def traffic(text: str) -> dict[str, float]:
  """{operation: bytes that it reads and writes in a step}, each operand in full."""
  found = collections.Counter()
  for visit in hlo.visits(hlo.parse(text)):
    if visit.instruction.opcode != "constant":
      arrays = (visit.instruction.type, *visit.operand_types)
      found[visit.instruction.name] += (visit.times or 1) * sum(map(hlo.num_bytes, arrays))
  return found


def profiled(run, steps: int) -> tuple[dict[str, float], float]:
  """Milliseconds of a step, by operation, and those in which none was being run."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        run()
    file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
    events = sorted((event.start_ns, event.duration_ns, event.name)
                    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
                    for line in plane.lines for event in line.events
                    if "hlo_op" in dict(event.stats) and not event.name.startswith(CONTAINERS))
  times, idle, end = collections.Counter(), 0, events[0][0]
  for start, duration, name in events:
    times[name] += duration / steps / 1e6
    idle += max(start - end, 0) / steps / 1e6
    end = max(end, start + duration)
  return times, idle


def kind(place: str) -> str:
  """The layer, pass and phase of an operation, by where it stands in the code."""
  phase = "attack" if "while/body" in place.partition("jvp")[0] else "training"
  if "jvp" not in place:
    return "optimizer, averages, noise"
  inner = place.split("features")[-1]
  layer = next((layer for part, layer in LAYERS.items() if part in inner), "other")
  return f"{phase}, {layer}, {'gradient' if 'transpose(jvp' in place else 'forward'}"


def main(argv):
  del argv
  keep_freed_memory()
  set_flags()
  for case in flags.FLAGS.cases:
    step, state, batch = build(case)
    compiled = step.lower(state, batch).compile()

    def run(compiled=compiled, batch=batch):
      nonlocal state
      state, metrics = compiled(state, batch)
      jax.block_until_ready(metrics)

    for _ in range(3):
      run()
    times, idle = profiled(run, _STEPS.value)
    places, total = operations(compiled.as_text()), sum(times.values()) + idle
    print(f"{case}: {total:.0f} ms of a step")
    moved = traffic(compiled.as_text())
    slow = {name: value - moved[name] / _MEMORY.value / 1e6 for name, value in times.items()
            if not places.get(name, ("", ""))[1].endswith(PRODUCTS)}
    for title, values in {"longest": times, "beyond what memory needs": slow}.items():
      print(title)
      for name, value in collections.Counter(values).most_common(_TOP.value):
        shape, place = places.get(name, ("", ""))
        print(f"{value:8.2f} ms {value / total:6.1%}  {name}  {shape}  {place[-90:]}")
    print("by layer")
    layers = collections.Counter({"untraced": idle})
    for name, value in times.items():
      layers[kind(places.get(name, ("", ""))[1])] += value
    for name, value in layers.most_common():
      print(f"{value:8.1f} ms {value / total:6.1%}  {name}")


if __name__ == "__main__":
  app.run(main)
