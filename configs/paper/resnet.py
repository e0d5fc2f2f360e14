"""ResNet-50, 101, 152 and 200 with and without AdvProp.

  python -m advprop_jax.main --config=configs/paper/resnet.py:resnet50,scheme=vanilla \
      --workdir=DIR --config.data.dir=DIRECTORY_OF_TFDS_DATA

Hardware: a TPU pod slice. Published top-1, vanilla -> AdvProp: 50 76.7 -> 77.4, 101 78.3 -> 79.2,
152 79.0 -> 79.8, 200 79.3 -> 80.1 (from memory of the paper). Here: not run. The paper's recipe for
ResNets is not at hand. This one has the batch rule and the warm-up of Goyal et al. (arXiv
1706.02677), 105 epochs, a cosine, the label smoothing, moving averages and bfloat16 of the
EfficientNets here, a padded crop in the place of the random-resized one, and their attacker.
"""

from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"network": ("resnet50", "resnet101", "resnet152", "resnet200"),
           "scheme": ("advprop", "vanilla")}


def get_config(variant: str = ""):
  """`variant`: a network and a scheme, such as "resnet152,vanilla"."""
  chosen = choose(variant, CHOICES)
  config = default_config()
  config.scheme = chosen["scheme"]
  config.model.name = chosen["network"]
  config.model.dtype = "bfloat16"
  imagenet_efficientnet.set_attack(config, 4)
  config.data.name = "imagenet2012"
  config.data.test_split = "validation"
  config.data.batch_size = 1024
  config.optimizer.name = "sgd"
  config.optimizer.nesterov = True
  config.optimizer.learning_rate = 0.1 * config.data.batch_size / 256
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_epochs = 5.0
  config.train.epochs = 105.0
  config.eval.batch_size = 1024
  config.eval.every_epochs = 5.0
  return config
