"""Training schemes: what a mini-batch becomes.

A scheme turns one mini-batch into *parts*. Each part has its images (clean ones, or the adversarial
counterpart of clean ones), the domain whose batch norms normalise it, and a weight in the loss

    loss = sum of weight * cross entropy(part)

A scheme is a row of the table below; no other code asks for its name.
"""

import dataclasses
from collections.abc import Mapping

CLEAN, ADVERSARIAL, AUTOAUGMENT = "clean", "adversarial", "autoaugment"
SECOND_VIEW = "second_image"  # the entry of a mini-batch with the second augmentation of its images


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the batches of images whose losses are summed.

  Attributes:
    name: the kind of images; also the name of its loss in the metrics.
    domain: whose batch norms normalise it, also while it is attacked.
    attacked: whether its images are made adversarial first.
    source: the entry of the mini-batch that its images come from.
    weight: its share of the loss; a part of weight 0 is not made.
    start_weight: of the loss of the attack's start. If it is not 0, the attack is one step, and the
      pass that it takes trains the network as well.
    slots: which of every `pieces` images of the mini-batch, as the two ends of a slice.
  """

  name: str
  domain: str
  attacked: bool = False
  source: str = "image"
  weight: float = 1.0
  start_weight: float = 0.0
  slots: tuple[int | None, int | None] = (None, None)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """What a mini-batch becomes.

  Attributes:
    parts: whose losses are summed. Parts of one domain have as many images each.
    pieces: a mini-batch is dealt out to disjoint parts in pieces of so many images; 1: each part
      takes all of them.
    per_image: a parameter's gradient is the weighted mean over the images that reach it, where it
      otherwise is the weighted sum of the parts' means.
    same_budget: epochs are as many as cost what the epochs of `vanilla` would.
  """

  parts: tuple[Part, ...]
  pieces: int = 1
  per_image: bool = False
  same_budget: bool = False

  @property
  def domains(self) -> tuple[str, ...]:
    """The domains of the model's banks, the main one first."""
    return tuple(dict.fromkeys(part.domain for part in self.parts))

  def __str__(self) -> str:
    """The loss in one line."""
    terms = []
    for part in self.made:
      terms.append(f"{part.weight:g} x L({part.name}; BN {part.domain})")
      if part.start_weight:
        terms.append(f"{part.start_weight:g} x L(its start)")
      if self.pieces > 1:
        terms[-1] += f" of {self.share(part):.0%} of the images"
    return " + ".join(terms) + (", mean over images" if self.per_image else "")

  @property
  def made(self) -> tuple[Part, ...]:
    """The parts that have a weight."""
    return tuple(part for part in self.parts if part.weight)

  @property
  def weights(self) -> dict[str, float]:
    """{name: weight} of every loss, those of the starts among them."""
    starts = {f"{part.name}_start": part.start_weight for part in self.parts if part.start_weight}
    return {part.name: part.weight for part in self.parts} | starts

  def share(self, part: Part) -> float:
    """How much of the mini-batch a part takes, in (0, 1]."""
    return len(range(self.pieces)[slice(*part.slots)]) / self.pieces

  def coefficient(self, part: Part, weight: float) -> float:
    """What the part's mean loss is multiplied by, for one of its two weights."""
    return weight * self.share(part) if self.per_image else weight

  @property
  def budget(self) -> float:
    """Passes that train or attack, per image and relative to `vanilla`, with one attack step."""
    return sum(self.share(part) * (1 + part.attacked) for part in self.made)

  def adjusted(self, weights: Mapping[str, float], one_in: int | None = None) -> "Scheme":
    """The scheme with other weights {name of a loss: weight} or, if it has pieces, other pieces.

    Weights and pieces that are not given (None) stay as they are.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    parts = tuple(dataclasses.replace(
        part, weight=given.get(part.name, part.weight),
        start_weight=part.start_weight and given.get(f"{part.name}_start", part.start_weight))
                  for part in self.parts)
    pieces = one_in if one_in and self.pieces > 1 else self.pieces
    return dataclasses.replace(self, parts=parts, pieces=pieces)


_CLEAN = Part(CLEAN, CLEAN)
_AUXILIARY = Part(ADVERSARIAL, ADVERSARIAL, attacked=True)

SCHEMES = {
    # Clean images: what the paper compares with.
    "vanilla": Scheme((_CLEAN,)),
    # Adversarial images alone, in the place of the clean ones (Madry et al., ICLR 2018).
    "adversarial": Scheme((Part(ADVERSARIAL, CLEAN, attacked=True),)),
    # Both through the same batch norms: the baseline that AdvProp explains.
    "joint": Scheme((_CLEAN, Part(ADVERSARIAL, CLEAN, attacked=True))),
    # Each through its own batch norms (Algorithm 1).
    "advprop": Scheme((_CLEAN, _AUXILIARY)),
    # A third set of batch norms for strongly augmented images. What is attacked is the basic view;
    # give adversarial_second a weight to attack the second one as well (from the same noise), and
    # adversarial the weight 0 to attack the second one alone.
    "fine_grained": Scheme((
        _CLEAN,
        Part(AUTOAUGMENT, AUTOAUGMENT, source=SECOND_VIEW),
        _AUXILIARY,
        Part("adversarial_second", ADVERSARIAL, attacked=True, source=SECOND_VIEW, weight=0.0))),
    # Disjoint parts, one attack step whose pass trains too, as cheap as vanilla (Mei et al., ICLR
    # 2022; weights and 4:1 from scripts/run_fastadvprop.sh of meijieru/fast_advprop).
    "fast_advprop": Scheme(
        (dataclasses.replace(_CLEAN, slots=(None, -1)),
         dataclasses.replace(_AUXILIARY, slots=(-1, None), weight=0.5, start_weight=0.5)),
        pieces=5, per_image=True, same_budget=True),
}
