"""The table of schemes."""

import pytest

from advprop_jax.method.schemes import SCHEMES


def test_advprop_attacks_the_images_of_the_auxiliary_domain():
  scheme = SCHEMES["advprop"]
  assert scheme.domains == ("clean", "adversarial")
  assert [(part.attacked, part.weight) for part in scheme.parts] == [(False, 1), (True, 1)]


def test_vanilla_is_the_ordinary_training():
  assert SCHEMES["vanilla"].domains == ("clean",)
  assert not any(part.attacked for part in SCHEMES["vanilla"].parts)


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_can_be_one_pass(name):
  """One pass takes the images of each domain together, as many for each."""
  domains = [part.domain for part in SCHEMES[name].parts]
  each = len(domains) // len(set(domains))
  assert domains == [d for d in SCHEMES[name].domains for _ in range(each)]


def test_weights_are_by_part():
  scheme = SCHEMES["advprop"].weighted({"adversarial": 0.5, "another": 2.0})
  assert [part.weight for part in scheme.parts] == [1.0, 0.5]
  assert [part.weight for part in SCHEMES["advprop"].parts] == [1.0, 1.0]
