"""ResNet-50, 101, 152 and 200 on ImageNet: AdvProp, or vanilla.

  python -m advprop_jax.main --config=configs/imagenet_resnet.py:50 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA
  python -m advprop_jax.main --config=configs/imagenet_resnet.py:200,vanilla,chips=32 ...

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said, which make the same updates whatever
their number. Published top-1, vanilla -> AdvProp: 50 76.7 -> 77.4, 101 78.3 -> 79.2, 152 79.0 ->
79.8, 200 79.3 -> 80.1 (from memory of the paper). Here: not run.

*Source:* tensorflow/tpu, models/official/resnet/resnet_main.py: 90 epochs of batches of 1024,
Nesterov momentum, 0.1 per 256 images after 5 epochs of warm-up, weight decay 1e-4 on all but batch
norms, no moving averages, bfloat16. The paper's own recipe for ResNets is not at hand. Not of that
source: the cosine (steps of 0.1 there, at 30, 60 and 80 epochs), the label smoothing (0 there), the
groups of batch norms above 8 chips, and the attacker, which is that of the large EfficientNets.
"""

from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHIPS = imagenet_efficientnet.CHIPS
CHOICES = {"depth": ("50", "101", "152", "200"), "scheme": ("advprop", "vanilla"), "chips": CHIPS}

BATCH_SIZE = 1024
# Images of one chip at a time, without remat: the estimate of imagenet_efficientnet.py, of 89, 130,
# 180 and 258 MB for an image.
AT_ONCE = {"50": 128, "101": 64, "152": 64, "200": 32}


def get_config(variant: str = ""):
  """`variant`: a depth, a scheme, and a number of chips, such as "152,vanilla,chips=32"."""
  chosen = choose(variant, CHOICES)
  config = recipe(chosen["depth"], int(chosen["chips"]))
  config.scheme = chosen["scheme"]
  return config


def recipe(depth: str, chips: int, batch_size: int = BATCH_SIZE):
  """The training of a ResNet, `depth` from "50" to "200", with AdvProp.

  Args:
    depth: a key of AT_ONCE.
    chips: number of devices.
    batch_size: images per update; the learning rate is in proportion.
  """
  config = default_config()
  config.model.name = f"resnet{depth}"
  config.model.dtype = "bfloat16"
  imagenet_efficientnet.set_attack(config, 4)
  config.data.name = "imagenet2012"
  config.data.test_split = "validation"
  config.data.crop, config.data.augment = "random_resized", "crop_flip"
  config.loss.label_smoothing = 0.1
  config.optimizer.name = "sgd"
  config.optimizer.momentum, config.optimizer.nesterov = 0.9, True
  config.optimizer.learning_rate = 0.1 * batch_size / 256
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_epochs = 5.0
  config.train.epochs = 90.0
  config.train.ema_decay = 0.0
  config.eval.every_epochs = 5.0
  imagenet_efficientnet.set_chips(config, chips, batch_size, AT_ONCE[depth], AT_ONCE[depth])
  return config
