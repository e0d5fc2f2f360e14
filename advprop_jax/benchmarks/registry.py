"""Every benchmark by name. A new one is a function, Subject -> Benchmark, and a line here."""

from advprop_jax.benchmarks.adversarial import (
  auto_pgd,
  auxiliary_norms,
  main_norms,
  strength,
  transferred,
)
from advprop_jax.benchmarks.clean import clean
from advprop_jax.benchmarks.imagenet_c import imagenet_c
from advprop_jax.benchmarks.imagenet_sets import SETS, of_set
from advprop_jax.benchmarks.in_memory import corruptions, styles

# Name in config.eval.benchmarks -> Subject -> Benchmark. They are measured in this order.
BENCHMARKS = {
    "clean": clean,
    "adversarial": main_norms,
    "auxiliary": auxiliary_norms,
    "strength": strength,
    "apgd": auto_pgd,
    "transfer": transferred,
    "corruptions": corruptions,
    "stylized": styles,
    "imagenet_c": imagenet_c,
    **{name: of_set(name) for name in SETS},
}
