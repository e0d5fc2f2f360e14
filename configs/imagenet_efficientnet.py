"""EfficientNet B0-B8 on ImageNet, the recipe of the paper: AdvProp, or vanilla.

  python -m advprop_jax.main --config=configs/imagenet_efficientnet.py:b0 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA
  python -m advprop_jax.main --config=configs/imagenet_efficientnet.py:b7,vanilla,chips=512 ...
  python -m advprop_jax.main --config=configs/imagenet_efficientnet.py:b0,chips=1 ...

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Any number of them makes the same
updates: of 4096 images, one learning rate, by gradient accumulation where they do not fit at once.
Only the batch norms see other groups of images (bn_group_size), and with few chips and B5 to B8
these are small. Published top-1, B0 to B8 (tensorflow/tpu): with AutoAugment 77.1 79.1 80.1 81.6
82.9 83.6 84.0 84.3 -, with AdvProp 77.6 79.6 80.5 81.9 83.3 84.3 84.8 85.2 85.5. Here: not run.

*Source:* flag defaults of tensorflow/tpu, models/official/efficientnet/main.py; the batch of 4096
makes their rate the 0.256 of Tan and Le, ICML 2019 (the flag is 2048). Dropout and stochastic depth
are the networks' own.
"""

from advprop_jax.errors import InputError
from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose

# Small networks learn most from weak attackers, large ones from strong ones. 1 for B0 to B2 and 4
# for B4 to B8 are the paper's as remembered, not checked; B3's 2 is this project's choice.
EPSILON = {"b0": 1, "b1": 1, "b2": 1, "b3": 2, "b4": 4, "b5": 4, "b6": 4, "b7": 4, "b8": 4}
CHIPS = ("8", "1", "2", "4", "16", "32", "64", "128", "256", "512", "1024")
CHOICES = {"size": tuple(EPSILON), "scheme": ("advprop", "vanilla"), "chips": CHIPS}

BATCH_SIZE = 4096
# Images of one chip at a time, as a power of two: where a gradient keeps what it needs, and where
# it computes blocks again (model.remat). An estimate, not measured: no chip has run it. Of 16 GB,
# 14 are for images, less 24 bytes for each parameter. Of each image, clean and adversarial, 4 bytes
# are kept for each value that a convolution gives (it and its activation, bfloat16), from 54 MB for
# B0 to 3.5 GB for B8; with remat 2 bytes for each value that goes into a block, and one block
# whole, from 12 MB to 0.36 GB. Two small networks, compiled for a TPU v5e, take 2 and 4 bytes in
# the place of the 4, and with remat 1.1 and 1.2 times what is reckoned.
AT_ONCE = {"b0": (128, 128), "b1": (128, 128), "b2": (64, 128), "b3": (64, 128), "b4": (32, 128),
           "b5": (16, 64), "b6": (8, 32), "b7": (4, 32), "b8": (2, 16)}


def get_config(variant: str = ""):
  """`variant`: b0 ... b8, a scheme, and a number of chips, such as "b7,vanilla,chips=512"."""
  chosen = choose(variant, CHOICES)
  config = recipe(chosen["size"], int(chosen["chips"]))
  config.scheme = chosen["scheme"]
  set_attack(config, EPSILON[chosen["size"]])
  return config


def recipe(size: str, chips: int):
  """The training of an EfficientNet, `size` from "b0" to "b8", as AdvProp has it."""
  config = default_config()
  config.model.name = f"efficientnet_{size}"
  config.model.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.test_split = "validation"
  config.data.crop, config.data.augment = "random_resized", "autoaugment"
  config.loss.label_smoothing = 0.1
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 0.016 * BATCH_SIZE / 256
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.schedule = "exponential"
  config.optimizer.decay_rate, config.optimizer.decay_epochs = 0.97, 2.4
  config.optimizer.weight_decay = 1e-5
  config.train.epochs = 350.0
  config.train.ema_decay = 0.9999
  config.eval.every_epochs = 5.0
  set_chips(config, chips, BATCH_SIZE, *AT_ONCE[size])
  return config


def set_attack(config, epsilon: int) -> None:
  """The attacker of the paper: steps of 1, epsilon + 1 of them, or one where epsilon is 1."""
  config.attack.epsilon = float(epsilon)
  config.attack.step_size = 1.0
  config.attack.num_steps = 1 if epsilon == 1 else epsilon + 1


def set_chips(config, chips: int, batch_size: int, kept: int, recomputed: int) -> None:
  """Deals batches out to chips: micro-batches, remat, groups of batch norms, evaluation.

  Args:
    config: is changed.
    chips: so many devices, over all processes.
    batch_size: images per update.
    kept: images that one chip holds at a time without remat.
    recomputed: the same with remat, which is for networks whose `kept` is below 32: batch norms
      want more.

  Raises:
    InputError: the chips cannot share the batch in equal micro-batches.
  """
  remat = kept < min(32, batch_size // chips)
  at_once = recomputed if remat else kept
  accumulation = max(1, batch_size // (chips * at_once))
  if batch_size % (chips * accumulation):
    raise InputError(f"chips={chips}: {batch_size} images do not make {accumulation} equal "
                     f"micro-batches for each; give a power of two")
  config.data.batch_size = batch_size
  config.train.accumulation = accumulation
  config.model.remat = remat
  config.model.bn_group_size = bn_group_size(chips)
  # As many as fit, but not so many that the last batch of 50,000 images is mostly padding.
  config.eval.batch_size = min(chips * at_once, 8192)


def bn_group_size(chips: int) -> int:
  """Replicas whose batches are normalised as one: 1 up to 8 replicas, else 8, or an eighth of them.

  Raises:
    InputError: the chips do not divide into such groups.

  *Source:* tensorflow/tpu, models/official/efficientnet/utils.py, TpuBatchNormalization.
  """
  size = 1 if chips <= 8 else max(8, chips // 8)
  if chips % size:
    raise InputError(f"chips={chips}: do not divide into groups of {size} for the batch norms; "
                     "give a multiple of 8")
  return size
