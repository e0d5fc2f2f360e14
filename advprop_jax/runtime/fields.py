"""Every field of a config: its default, what it means, and what it may be."""

import dataclasses
import difflib
from collections.abc import Callable, Collection
from typing import Any

from advprop_jax import models
from advprop_jax.benchmarks.adversarial import epsilons
from advprop_jax.benchmarks.registry import BENCHMARKS
from advprop_jax.data.transforms import AUGMENTATIONS, CROPS
from advprop_jax.method import attack, optimizer
from advprop_jax.method.schemes import SCHEMES
from advprop_jax.models.conventions import CONVENTIONS

Check = Callable[[Any], str | None]  # a value -> what would do, or None where it will do


def one_of(names: Collection[str]) -> Check:
  """A name out of a few."""
  def check(value):
    close = difflib.get_close_matches(str(value), names, 1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return None if value in names else f"one of {', '.join(sorted(names))}{meant}"

  return check


def between(low: float, high: float = float("inf"), open_high: bool = False) -> Check:
  """A number in [low, high], or in [low, high) if open_high."""
  text = f"at least {low}" if high == float("inf") else (
      f"at least {low} and {'below' if open_high else 'at most'} {high}")

  def check(value):
    return None if low <= value < high or (value == high and not open_high) else text

  return check


def known_network(name: str) -> str | None:
  """The name of a network, with or without timm's tf_."""
  return one_of(models.NAMES)(name.removeprefix("tf_"))


def not_empty(value: str) -> str | None:
  """A text that says something."""
  return None if value.strip() else "a path or an id, or leave it unset"


def names_in(text: str) -> list[str]:
  """The names of a field that holds several with commas between; "" where there is none."""
  return [name.strip() for name in text.split(",")]


def benchmark_names(value: str) -> str | None:
  """Names of benchmarks, with commas between."""
  return next(filter(None, map(one_of(BENCHMARKS), names_in(value))), None)


def strengths(value: str) -> str | None:
  """Numbers with commas between, each once."""
  try:
    epsilons(value)
  except ValueError:
    return "numbers of at least 0 with commas between, each once, such as '1,2,4'"
  return None


def anything(value: Any) -> None:
  """No condition but the type."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One field: its default (None: not set), its type, what it means, and what it may be."""

  default: Any
  type: type
  meaning: str
  check: Check = anything


EXPORT_FORMATS = ("timm", "stablehlo", "checkpoint")
POSITIVE, NOT_NEGATIVE, SHARE = between(1), between(0), between(0, 1)

FIELDS = {
    "scheme": Field("advprop", str, "what a mini-batch becomes", one_of(SCHEMES)),
    "seed": Field(0, int, "of weights, data order, attack and dropout", between(0, 2**32 - 1)),

    "model.name": Field("efficientnet_b0", str, "network", known_network),
    "model.pretrained": Field(None, str, "weights to start from: a .safetensors or .pth file, an "
                              "id on the Hugging Face hub, a workdir, or an exported checkpoint",
                              not_empty),
    "model.input_convention": Field(None, str, "how images are normalised for the first "
                                    "convolution; not set: as the pretrained weights want it, else "
                                    "not at all, which is 'inception'", one_of(CONVENTIONS)),
    "model.dtype": Field("float32", str, "compute type", one_of(("float32", "bfloat16"))),
    "model.dropout_rate": Field(None, float, "before the classifier; not set: the network's own",
                                between(0, 1, open_high=True)),
    "model.drop_path_rate": Field(None, float, "stochastic depth of the last block; not set: the "
                                  "network's own", between(0, 1, open_high=True)),
    "model.share_statistics": Field(False, bool, "one mean and variance for all domains"),
    "model.share_affine": Field(False, bool, "one scale and bias for all domains"),
    "model.bn_group_size": Field(1, int, "replicas whose batches are normalised as one", POSITIVE),
    "model.remat": Field(False, bool, "gradients compute what is inside of blocks again: less "
                         "memory, more time, the same numbers"),

    "attack.name": Field("pgd", str, "attacker", one_of(attack.ATTACKS)),
    "attack.norm": Field("linf", str, "of ball and step", one_of(attack.NORMS)),
    "attack.epsilon": Field(4.0, float, "radius of the ball, 0-255 units", NOT_NEGATIVE),
    "attack.step_size": Field(1.0, float, "of one step, 0-255 units", NOT_NEGATIVE),
    "attack.num_steps": Field(5, int, "steps", NOT_NEGATIVE),
    "attack.clean_start": Field(0.0, float, "probability of a start without noise", SHARE),
    "attack.statistics": Field("running", str, "batch norm of the attacked network",
                               one_of(attack.STATISTICS)),
    "attack.target": Field("none", str, "away from the label, or towards another",
                           one_of(attack.TARGETS)),
    "attack.dropout": Field(False, bool, "dropout in the attacked network"),
    "attack.label_smoothing": Field(None, float, "of the attacked loss; not set: the same",
                                    SHARE),
    "attack.ramp_epochs": Field(0.0, float, "over which epsilon grows from 0", NOT_NEGATIVE),
    "attack.ramp_steps": Field(None, int, "in place of ramp_epochs", NOT_NEGATIVE),
    "attack.one_in": Field(None, int, "of fast_advprop: attacks one image in so many; not set: 5",
                           between(2)),

    "data.name": Field("bundled", str, "'bundled', 'folder' (of class folders), 'imagenet_folder' "
                       "(its classes, whatever of them there is), or a TFDS data set prepared as "
                       "array_record"),
    "data.dir": Field(None, str, "folder of TFDS data sets, local or gs://, or that holds "
                      "train/CLASS/ and test/CLASS/"),
    "data.broken": Field("fatal", str, "images that are not whole: an error, or left out, by the "
                         "index of folders and in training", one_of(("fatal", "skip"))),
    "data.train_split": Field("train", str, "split to train on"),
    "data.test_split": Field("test", str, "split to evaluate on; of imagenet_folder any folder in "
                             "data.dir, such as gaussian_noise/3"),
    "data.image_size": Field(None, int, "height and width, pixels; not set: the network's own",
                             POSITIVE),
    "data.crop_fraction": Field(None, float, "of the shorter side of a test image, that is shown; "
                                "not set: size / (size + 32) of the network's own size from "
                                "200 pixels, else 1", between(0.1, 1)),
    "data.batch_size": Field(128, int, "images per update, over all devices", POSITIVE),
    "data.augment": Field("crop_flip", str, "of training images", one_of(AUGMENTATIONS)),
    "data.second_augment": Field(None, str, "of the second view, for fine_grained",
                                 one_of(("autoaugment", "randaugment"))),
    "data.crop": Field("pad", str, "of training images before they are flipped and augmented: of "
                       "small ones with a border, of photographs random_resized", one_of(CROPS)),
    "data.padding": Field(4, int, "of the crop 'pad', pixels on each side", NOT_NEGATIVE),
    "data.num_workers": Field(0, int, "processes that read and decode; 0: in the main one",
                              NOT_NEGATIVE),
    "data.num_threads": Field(2, int, "that read and decode, of each such process; 0: in the main "
                              "one", NOT_NEGATIVE),

    "loss.label_smoothing": Field(0.1, float, "of the loss, also of the attacked one", SHARE),
    **{f"loss.weights.{name}": Field(None, float, "of these images' loss; not set: the scheme's",
                                     NOT_NEGATIVE)
       for name in dict.fromkeys(name for scheme in SCHEMES.values()
                                 for name in scheme.weights)},

    "optimizer.name": Field("rmsprop", str, "optimizer", one_of(optimizer.OPTIMIZERS)),
    "optimizer.learning_rate": Field(0.016, float, "highest one", NOT_NEGATIVE),
    "optimizer.schedule": Field("exponential", str, "of the learning rate",
                                one_of(optimizer.SCHEDULES)),
    "optimizer.warmup_epochs": Field(0.0, float, "linear warm-up", NOT_NEGATIVE),
    "optimizer.warmup_steps": Field(None, int, "in place of warmup_epochs", NOT_NEGATIVE),
    "optimizer.decay_rate": Field(0.97, float, "of schedule exponential", between(0, 1)),
    "optimizer.decay_epochs": Field(2.4, float, "between two decays", between(1e-6)),
    "optimizer.decay_steps": Field(None, int, "in place of decay_epochs", POSITIVE),
    "optimizer.momentum": Field(0.9, float, "of rmsprop and sgd", between(0, 1, open_high=True)),
    "optimizer.nesterov": Field(False, bool, "Nesterov momentum, of sgd"),
    "optimizer.rms_decay": Field(0.9, float, "of rmsprop", between(0, 1, open_high=True)),
    "optimizer.epsilon": Field(1e-3, float, "of rmsprop and adamw", NOT_NEGATIVE),
    "optimizer.b1": Field(0.9, float, "of adamw", between(0, 1, open_high=True)),
    "optimizer.b2": Field(0.999, float, "of adamw", between(0, 1, open_high=True)),
    "optimizer.weight_decay": Field(1e-5, float, "weight decay", NOT_NEGATIVE),
    "optimizer.weight_decay_form": Field("l2", str, "in the loss, or of the weights themselves",
                                         one_of(optimizer.DECAY_FORMS)),
    "optimizer.decay_batch_norm": Field(False, bool, "scales and biases of batch norms decay too"),

    "optimizer.trainable": Field("all", str, "which weights are trained: all, or batch norms and "
                                 "the classifier alone", one_of(optimizer.TRAINABLE)),

    "train.epochs": Field(350.0, float, "length of training", NOT_NEGATIVE),
    "train.steps": Field(None, int, "in place of train.epochs", NOT_NEGATIVE),
    "train.accumulation": Field(1, int, "micro-batches per update", POSITIVE),
    "train.ema_decay": Field(0.9999, float, "of weights and statistics; 0: none",
                             between(0, 1, open_high=True)),
    "train.max_skips": Field(0, int, "how many times a loss that is not finite sends the run back "
                             "to its newest checkpoint, past the batches since; 0: it ends",
                             NOT_NEGATIVE),
    "train.log_every": Field(50, int, "steps between two lines of metrics", POSITIVE),

    "eval.batch_size": Field(256, int, "images per step, over all devices", POSITIVE),
    "eval.every_epochs": Field(1.0, float, "between two evaluations on clean images; 0: at the "
                               "end alone", NOT_NEGATIVE),
    "eval.every_steps": Field(None, int, "in place of every_epochs", NOT_NEGATIVE),
    "eval.checkpoint": Field("newest", str, "of --mode=evaluate and export", one_of(("newest",
                                                                                      "best"))),
    "eval.photographs": Field(None, str, "folder of images without labels: --mode=evaluate prints "
                              "what they show"),
    "eval.benchmarks": Field("clean,adversarial,auxiliary", str, "what is measured, names with "
                             "commas between", benchmark_names),
    "eval.dir": Field(None, str, "folder of benchmarks' images; not set: data.dir"),
    "eval.num_workers": Field(None, int, "processes that make test images; not set: as in "
                              "training, and for corrupted images as many as there are cores",
                              NOT_NEGATIVE),
    "eval.corrupted_images": Field(None, int, "only the first so many test images are corrupted, "
                                   "or stylized",
                                   POSITIVE),
    "eval.restarts": Field(1, int, "attacks of each image, of which the strongest counts",
                           POSITIVE),
    "eval.strengths": Field("0.5,1,2,4,8", str, "epsilons of the benchmark 'strength', 0-255 units",
                            strengths),
    "eval.apgd_steps": Field(100, int, "of the benchmark 'apgd'", POSITIVE),
    "eval.transfer_from": Field(None, str, "of the benchmark 'transfer': the network that is "
                                "attacked, as in model.pretrained", not_empty),
    "eval.transfer_network": Field(None, str, "its name, if it is published weights of another "
                                   "network; not set: model.name", known_network),
    "eval.attack": Field(None, str, "name of the final attack; not set: the training's",
                         one_of(attack.ATTACKS)),
    "eval.epsilon": Field(None, float, "of the final attack; not set: the training's",
                          NOT_NEGATIVE),
    "eval.step_size": Field(None, float, "of the final attack; not set: the training's",
                            NOT_NEGATIVE),
    "eval.num_steps": Field(None, int, "of the final attack; not set: the training's",
                            NOT_NEGATIVE),

    "export.format": Field("timm", str, "of --mode=export", one_of(EXPORT_FORMATS)),
    "export.dir": Field(None, str, "folder that is written; not set: WORKDIR/export/FORMAT"),
    "export.weights": Field("averages", str, "moving averages, or the weights as trained; what is "
                            "exported, evaluated and shown photographs",
                            one_of(("averages", "trained"))),

    "report.runs": Field(None, str, "of --mode=report: further workdirs, with commas between",
                         not_empty),

    "checkpoint.every_epochs": Field(1.0, float, "between two checkpoints; 0: at the end alone",
                                     NOT_NEGATIVE),
    "checkpoint.every_steps": Field(None, int, "in place of every_epochs", NOT_NEGATIVE),
    "checkpoint.on_failure": Field("stop", str, "what becomes of a training whose checkpoint or "
                                   "metrics cannot be written", one_of(("stop", "continue"))),
    "checkpoint.keep": Field(2, int, "newest checkpoints kept, beside the best one", POSITIVE),
}
