"""What stands behind the colon of --config=FILE.py:VARIANT."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from advprop_jax.errors import InputError

Choices = Mapping[str, Sequence[str]]  # name -> its values, the first one the default


def choose(variant: str, choices: Choices) -> dict[str, str]:
  """The values that a variant names; the others are the defaults.

  Args:
    variant: "name=value" or only "value", separated by commas, in any order: "b3,epsilon=2".
    choices: what there is to choose.

  Returns:
    {name: value} of every choice.

  Raises:
    InputError: a name or value that is not there, or something chosen twice.
  """
  chosen = {}
  for word in filter(None, variant.split(",")):
    name, equals, value = word.rpartition("=")
    names = [name] if equals else [name for name in choices if value in choices[name]]
    if len(names) != 1 or value not in choices.get(names[0], ()) or names[0] in chosen:
      there = "; ".join(f"{name}={'|'.join(values)}" for name, values in choices.items())
      raise InputError(f"--config: {word!r} of the variant {variant!r} is unknown, or chosen "
                       f"twice; there is {there}")
    chosen[names[0]] = value
  return {name: chosen.get(name, values[0]) for name, values in choices.items()}


def variants(choices: Choices) -> Iterator[str]:
  """Every variant that `choose` understands, by names and values."""
  for values in itertools.product(*choices.values()):
    yield ",".join(f"{name}={value}" for name, value in zip(choices, values, strict=True))
