"""A pod on this machine: several processes, each with several virtual CPU devices, one command.

  python launch/local_pod.py --processes=2 --devices=2 -- \
      --config=configs/quickstart.py --workdir=DIR

What follows `--` goes to every process of advprop_jax.main. Lines of output begin with the number
of their process. When one process fails, the others get some seconds to end by themselves, and are
killed then. Exit code: that of the process that failed first, 128 + its number for a signal; of one
that ended because another did only where there is no other.
SIGTERM and SIGINT are passed on to all.
"""

import argparse
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
EFFECTS = (3, -signal.SIGABRT)   # how processes end because another did
# What the library of CPU collectives prints when it has connected, several threads at once.
_NOISE = re.compile(rb"\[Gloo\] Rank|connected to \d+ peer ranks|connected peer ranks is")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Own flags, and those of the processes."""
  argv = list(argv)
  cut = argv.index("--") if "--" in argv else len(argv)
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=_positive, default=2, help="default: 2")
  parser.add_argument("--devices", type=_positive, default=2,
                      help="virtual CPU devices of each process; default: 2")
  parser.add_argument("--grace", type=float, default=15.0, help="seconds that the others have to "
                      "end by themselves when one has failed; default: 15")
  parser.add_argument("--module", default="advprop_jax.main", help="what every process runs")
  return parser.parse_args(argv[:cut]), argv[cut + 1:]


def _positive(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text}: give at least 1")
  return number


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def start(flags: argparse.Namespace, rest: Sequence[str]) -> list[subprocess.Popen]:
  """Starts the processes; their output, both streams, is a pipe."""
  port = free_port()
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(flags.devices),
                 "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
  return [subprocess.Popen(
      [sys.executable, "-m", flags.module, *rest, f"--coordinator=localhost:{port}",
       f"--processes={flags.processes}", f"--process_id={index}"],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      start_new_session=True) for index in range(flags.processes)]


def show(index: int, process: subprocess.Popen) -> None:
  """Prints what a process prints, line by line, until it has ended."""
  for line in process.stdout:
    if not _NOISE.search(line):
      sys.stdout.buffer.write(f"[{index}] ".encode() + line)
      sys.stdout.buffer.flush()


def watch(processes: Sequence[subprocess.Popen], grace: float) -> int:
  """Waits until all have ended; the exit code.

  Args:
    processes: as `start` gives them.
    grace: seconds for the others to end by themselves when one has failed.
  """
  code, deadline = 0, math.inf
  while True:
    codes = [process.poll() for process in processes]   # asks all of them
    if any(codes) and deadline == math.inf:
      deadline = time.monotonic() + grace
      time.sleep(0.1)                # for others that fail at the same moment, as cause or effect
      continue
    if code in (0, *EFFECTS):
      code = first_cause(codes)
    if None not in codes:
      break
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
        process.wait()
      break
    time.sleep(0.05)
  return 128 - code if code < 0 else code


def first_cause(codes: Sequence[int | None]) -> int:
  """Of exit codes, None for none yet, the one that others may be due to; 0 if none failed."""
  failed = [code for code in codes if code]
  return next((code for code in failed if code not in EFFECTS), failed[0] if failed else 0)


def main(argv: Sequence[str]) -> int:
  """Runs the pod; the exit code."""
  flags, rest = parse(argv)
  processes = start(flags, rest)

  def pass_on(number, _):
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  threads = [threading.Thread(target=show, args=pair) for pair in enumerate(processes)]
  for thread in threads:
    thread.start()
  code = watch(processes, flags.grace)
  for thread in threads:
    thread.join()
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
