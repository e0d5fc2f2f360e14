"""The test images as they are."""

from advprop_jax.benchmarks.contract import Benchmark, Subject, test_pass

CLEAN = "clean"


def clean(subject: Subject) -> Benchmark:
  """Top-1 and top-5 of the network that is deployed, on the test images of `config.data`."""
  return Benchmark({CLEAN: test_pass(subject)})
