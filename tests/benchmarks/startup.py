"""Seconds from the command to the first step of training: first start, and later ones.

  python -m tests.benchmarks.startup --config=configs/quickstart.py --starts=3

The first start has an empty cache of compiled programs, the others have what it left there. Each
start is a fresh process on a fresh workdir, and is told to end when metrics.jsonl has its first
line. Prints one JSON line.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time


def seconds_to_first_step(config: str, folder: str, number: int, options: list[str]) -> float:
  workdir = pathlib.Path(folder, f"run{number}")
  start = time.perf_counter()
  process = subprocess.Popen(
      [sys.executable, "-m", "advprop_jax.main", f"--config={config}", f"--workdir={workdir}",
       "--config.train.log_every=1", *options],
      env={**os.environ, "XDG_CACHE_HOME": folder}, stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL)
  metrics = workdir / "metrics.jsonl"
  try:
    while not (metrics.exists() and metrics.stat().st_size):
      if process.poll() is not None:
        raise SystemExit(f"the run ended with exit code {process.returncode} before its first step")
      time.sleep(0.02)
    return time.perf_counter() - start
  finally:
    process.terminate()                # and not killed, as it may still write its program
    process.wait()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--starts", type=int, default=3)
  args, options = parser.parse_known_args()
  with tempfile.TemporaryDirectory() as folder:
    seconds = [seconds_to_first_step(args.config, folder, number, options)
               for number in range(args.starts)]
  print(json.dumps({"config": args.config, "first_start": round(seconds[0], 1),
                    "later_starts": [round(s, 1) for s in seconds[1:]],
                    "ratio": round(min(seconds[1:]) / seconds[0], 3)}))


if __name__ == "__main__":
  main()
