"""Training schemes: what a mini-batch becomes.

A scheme turns one mini-batch into *parts*. Each part has its images (clean, or the adversarial
counterpart of clean ones), the domain whose batch norms normalise it, and a weight in the loss

    loss = sum of weight * cross entropy(part)                         (Equation 3 of the paper)

A scheme is a row of the table below; no other code asks for its name.
"""

import dataclasses
from collections.abc import Mapping

CLEAN, ADVERSARIAL = "clean", "adversarial"


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the batches of images whose losses are summed.

  Attributes:
    name: the kind of images; also the name of its loss in the metrics.
    domain: whose batch norms normalise it, also while it is attacked.
    attacked: whether its images are made adversarial first.
    source: the entry of the mini-batch that its images come from.
    weight: its share of the loss.
  """

  name: str
  domain: str
  attacked: bool = False
  source: str = "image"
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scheme:
  """The parts of a mini-batch. Parts of one domain stand together, as many for each domain."""

  parts: tuple[Part, ...]

  @property
  def domains(self) -> tuple[str, ...]:
    """The domains of the model's banks, the main one first."""
    return tuple(dict.fromkeys(part.domain for part in self.parts))

  def weighted(self, weights: Mapping[str, float]) -> "Scheme":
    """The scheme with weights {name of a part: weight}; parts not named keep theirs."""
    return Scheme(tuple(dataclasses.replace(part, weight=weights.get(part.name, part.weight))
                        for part in self.parts))


SCHEMES = {
    # One network, clean images: what the paper compares with.
    "vanilla": Scheme((Part(CLEAN, CLEAN),)),
    # Clean and adversarial images, each through its own batch norms (Algorithm 1).
    "advprop": Scheme((Part(CLEAN, CLEAN), Part(ADVERSARIAL, ADVERSARIAL, attacked=True))),
}
