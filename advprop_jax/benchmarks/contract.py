"""What a benchmark is: some sets of images, how a network looks at them, what follows from that.

A benchmark is a function of the network to be measured, `Subject -> Benchmark`, with a name in the
registry (`registry.BENCHMARKS`). It opens its data and computes nothing; `measure.py` runs its
passes, and then asks `details` for what is more than the accuracy of each.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from advprop_jax.data.imagenet import WNIDS
from advprop_jax.data.sources import Source
from advprop_jax.data.transforms import EvaluationTransform, evaluation_transform
from advprop_jax.errors import InputError
from advprop_jax.method.attack import Attack
from advprop_jax.models.network import Network


class Unavailable(InputError):
  """This benchmark cannot be had of this network or here; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Surrogate:
  """Another network, whose adversarial images are shown to the one that is measured."""

  name: str
  model: Network
  variables: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
  """The network that is measured, but for its weights, and what it is measured with.

  Attributes:
    config: resolved.
    model: with all of its domains, the main one first.
    class_names: in the order of the logits; None where nobody knows.
    auxiliary: the domain whose batch norms see adversarial images; None if there is none.
    attack: of the evaluation.
    open_test: opens the test images of `config.data`, whose classes are the network's; or raises
      Unavailable.
    surrogate: for attacks that are transferred; None for none.
  """

  config: ml_collections.FrozenConfigDict
  model: Network
  class_names: tuple[str, ...] | None
  auxiliary: str | None
  attack: Attack
  open_test: Callable[[], Source]
  surrogate: Surrogate | None = None

  @property
  def main(self) -> str:
    """The domain whose batch norms are deployed."""
    return self.model.domains[0]

  @property
  def transform(self) -> EvaluationTransform:
    """What a test image goes through."""
    return evaluation_transform(self.config.data.image_size, self.config.data.crop_fraction)

  @property
  def knows_imagenet(self) -> bool:
    """Whether its classes are the 1000 of ImageNet, in their order."""
    if self.class_names is None:
      return self.model.num_classes == len(WNIDS)
    return self.class_names == WNIDS

  @property
  def tests_on_validation(self) -> bool:
    """Whether the test images are the validation images of ImageNet, all of them."""
    data = self.config.data
    return (self.knows_imagenet and data.name.startswith("imagenet")
            and data.test_split in ("val", "validation"))

  def require_imagenet(self) -> None:
    """Raises Unavailable unless the classes are those of ImageNet."""
    if not self.knows_imagenet:
      raise Unavailable(f"its images are of ImageNet's 1000 classes, the network's "
                        f"{self.model.num_classes} are others")


@dataclasses.dataclass(frozen=True)
class Pass:
  """One sweep of the network over images, each once.

  Attributes:
    source: all records, set after set.
    sets: {name: number of records}, in the order of the source.
    transform: of each image.
    domain: whose batch norms classify.
    attack: None for the images as they are.
    surrogate: the network that is attacked; None for the one that is measured.
    restarts: attacks of each image, of which the strongest counts.
    classes: labels that may be said; None for all.
    same_images: whether every set is the same images in the same order, as the corruptions are.
    slow_images: whether to make an image costs more than to look at it.
  """

  source: Source
  sets: Mapping[str, int]
  transform: EvaluationTransform
  domain: str
  attack: Attack | None = None
  surrogate: Surrogate | None = None
  restarts: int = 1
  classes: tuple[int, ...] | None = None
  same_images: bool = False
  slow_images: bool = False


Row = dict[str, Any]     # of the table: "top1", "top5", "loss", "ece", "images", "standard_error"


@dataclasses.dataclass(frozen=True)
class Measured:
  """What passes gave.

  Attributes:
    rows: {name of a pass: its row}.
    sets: {name of a pass: {name of a set: its row}}.
  """

  rows: Mapping[str, Row]
  sets: Mapping[str, Mapping[str, Row]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What is to be measured for one name of the registry.

  Attributes:
    passes: {name of a row of the table: pass}.
    details: (what its own passes gave, the rows of benchmarks before it) -> more than the rows say,
      as JSON knows it; it has its place in the results' "details".
  """

  passes: Mapping[str, Pass]
  details: Callable[[Measured, Mapping[str, Row]], dict[str, Any]] = lambda measured, rows: {}


def test_pass(subject: Subject, **settings) -> Pass:
  """A pass over the test images as they are; `settings` as of Pass."""
  source = subject.open_test()
  return Pass(source=source, sets={source.split: len(source)}, transform=subject.transform,
              **{"domain": subject.main, **settings})
