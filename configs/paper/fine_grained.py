"""More batch norms: basic, AutoAugment and adversarial images through one each.

  python -m advprop_jax.main --config=configs/paper/fine_grained.py:b0 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

`attacked` says which views are made adversarial: the basic one, the AutoAugment one, or both.

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published: it helps small networks
most; the numbers are not at hand. Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"size": tuple(f"b{i}" for i in range(9)), "attacked": ("basic", "autoaugment", "both"),
           "chips": imagenet_efficientnet.CHIPS}


def get_config(variant: str = ""):
  """`variant`: a size, what is attacked and a number of chips, such as "b0,both,chips=128"."""
  chosen = choose(variant, CHOICES)
  size, chips = chosen["size"], int(chosen["chips"])
  config = imagenet_efficientnet.get_config(f"{size},chips={chips}")
  # Up to four images of one, in the place of two.
  kept, recomputed = imagenet_efficientnet.AT_ONCE[size]
  imagenet_efficientnet.set_chips(config, chips, config.data.batch_size, kept // 2, recomputed // 2)
  config.scheme = "fine_grained"
  config.data.augment, config.data.second_augment = "crop_flip", "autoaugment"
  config.loss.weights.adversarial = float(chosen["attacked"] != "autoaugment")
  config.loss.weights.adversarial_second = float(chosen["attacked"] != "basic")
  return config
