"""Programs on several virtual CPU devices, whose number a process cannot change once JAX runs."""

import json
import os
import subprocess
import sys

HURRIED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def run(program: str, devices: int):
  """What a Python program prints as JSON, in a process of its own with so many devices.

  XLA does not optimise: such programs take longer to compile than to run.
  """
  flags = f"--xla_force_host_platform_device_count={devices} {HURRIED}"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                        check=False, env={**os.environ, "XLA_FLAGS": flags})
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)
