"""XLA's flags for the CPU that help, and that a user would not know."""

import importlib.util
import os
from importlib import metadata

import jax

# Measured one by one: tests/benchmarks/README.md.
_FLAGS = {
    # By default XLA drops optimization barriers on the CPU. `jax.checkpoint` (model.remat) needs
    # them, or XLA finds that a block and its second computation are the same, and keeps what was to
    # be computed again; so do forms of the CPU that are faster where something is computed once
    # (models/channels.py, dense.py, depthwise.py).
    "xla_disable_hlo_passes": "cse_barrier_expander",
    # Matrix products that are fused with nothing go to the faster library too.
    "xla_cpu_experimental_ynn_fusion_type": "+LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # Vectors as long as the processor has them; XLA's own limit is 256 bits.
    "xla_cpu_prefer_vector_width": "512",
    # LLVM's: a loop over the few channels of the first layers is not written out before it could
    # become vectors, and two vectors at a time hide how long exp takes.
    "xla_backend_extra_options": "-unroll-full-max-count=8,-force-vector-interleave=2",
}


def set_flags() -> list[str]:
  """Sets them in XLA_FLAGS; call it before JAX's first computation.

  Returns:
    The names of those that it set: not one that XLA_FLAGS has already, none where that names a
    file, nor where there may be another platform than the CPU, for which they would count as well.
  """
  given = os.environ.get("XLA_FLAGS", "").strip()
  if (given and not given.startswith("-")) or not _is_cpu_only():
    return []
  names = [name for name in _FLAGS if name not in given]
  os.environ["XLA_FLAGS"] = " ".join(
      [*given.split(), *[f"--{name}={_FLAGS[name]}" for name in names]])
  return names


def _is_cpu_only() -> bool:
  """Whether JAX has the CPU alone to run on; asking JAX itself would make it read its flags."""
  if jax.config.jax_platforms:
    return jax.config.jax_platforms == "cpu"
  return not (any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
              or metadata.entry_points(group="jax_plugins"))
