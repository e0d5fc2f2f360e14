"""Runs a command, and prints the largest resident size that it had, in MiB.

  python -m tests.benchmarks.resident python -m tests.benchmarks.step --cases=vanilla --repeats=3
"""

import resource
import subprocess
import sys


def main() -> int:
  done = subprocess.run(sys.argv[1:], check=False)
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  print(f"{peak / 1024:.0f} MiB at most: {' '.join(sys.argv[1:])}")
  return done.returncode


if __name__ == "__main__":
  sys.exit(main())
