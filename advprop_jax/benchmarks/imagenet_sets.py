"""Other images of ImageNet's classes: ImageNet-A, -R, -V2, -Sketch and Stylized-ImageNet.

*Source:* Hendrycks et al., "Natural Adversarial Examples", CVPR 2021 (A); "The Many Faces of
Robustness", ICCV 2021 (R); Recht et al., "Do ImageNet Classifiers Generalize to ImageNet?", ICML
2019 (V2, matched frequency); Wang et al., NeurIPS 2019 (Sketch); Geirhos et al., ICLR 2019
(Stylized).
"""

import dataclasses
import functools
import os
from collections.abc import Callable

from advprop_jax.benchmarks.contract import Benchmark, Pass, Subject, Unavailable
from advprop_jax.data import imagenet
from advprop_jax.data.imagenet_folder import open_imagenet
from advprop_jax.data.sources import Source, open_source
from advprop_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ImagenetSet:
  """A set of images of ImageNet's classes.

  Attributes:
    folders: names that it has once unpacked; the first that is in `config.eval.dir` is taken.
    tfds: its name in TFDS, looked for next, split "test"; None where TFDS has none.
    classes: labels that it has images of: only their logits count. None for all.
  """

  folders: tuple[str, ...]
  tfds: str | None = None
  classes: tuple[int, ...] | None = None


SETS = {
    # 200 classes; only their logits count (eval.py of hendrycks/natural-adv-examples and of
    # hendrycks/imagenet-r).
    "imagenet_a": ImagenetSet(("imagenet-a",), "imagenet_a", imagenet.CLASSES_OF_A),
    "imagenet_r": ImagenetSet(("imagenet-r",), "imagenet_r", imagenet.CLASSES_OF_R),
    "imagenet_v2": ImagenetSet(("imagenetv2-matched-frequency-format-val",
                                "imagenetv2-matched-frequency"), "imagenet_v2/matched-frequency"),
    "imagenet_sketch": ImagenetSet(("sketch", "imagenet-sketch"), "imagenet_sketch"),
    "stylized_imagenet": ImagenetSet(("stylized-imagenet/val", "stylized-imagenet",
                                      "Stylized-ImageNet/val")),
}


def of_set(name: str) -> Callable[[Subject], Benchmark]:
  """The benchmark of one of SETS."""
  return functools.partial(_benchmark, name)


def _benchmark(name: str, subject: Subject) -> Benchmark:
  subject.require_imagenet()
  source = open_set(subject, SETS[name].folders, SETS[name].tfds)
  return Benchmark({name: Pass(source=source, sets={name: len(source)},
                               transform=subject.transform, domain=subject.main,
                               classes=SETS[name].classes)})


def open_set(subject: Subject, folders: tuple[str, ...], tfds: str | None,
             split: str = "test") -> Source:
  """Opens what is there of a set: class folders, else data of TFDS.

  Args:
    subject: whose config says where to look.
    folders: names of folders of class folders, the first that is there is taken.
    tfds: a name in TFDS, or None.
    split: of the TFDS data.

  Raises:
    Unavailable: nothing is there.
    InputError: what is there cannot be read.
  """
  directory = benchmark_dir(subject)
  try:
    for folder in folders:
      if os.path.isdir(os.path.join(directory, folder)):
        return open_imagenet(directory, folder, subject.config.data.broken)
    if tfds and os.path.isdir(os.path.join(directory, *tfds.split("/"))):
      return open_source(tfds, directory, split)
  except InputError as error:          # which names the field that training takes
    field = "config.eval.dir" if subject.config.eval.dir else "config.data.dir"
    raise InputError(str(error).replace("data.dir", field)) from error
  raise Unavailable(f"{directory!r} (config.eval.dir) has no folder "
                    f"{' or '.join(map(repr, folders))}"
                    f"{f', and no TFDS data {tfds!r}' if tfds else ''}")


def benchmark_dir(subject: Subject) -> str:
  """Where sets of images lie; Unavailable where the config does not say it."""
  directory = subject.config.eval.dir or subject.config.data.dir
  if not directory:
    raise Unavailable("config.eval.dir, the folder that holds such sets, is not set")
  return os.path.expanduser(directory)
