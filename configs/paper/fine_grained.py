"""More batch norms: basic, AutoAugment and adversarial images through one each.

  python -m advprop_jax.main --config=configs/paper/fine_grained.py:b0 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

`attacked` says which views are made adversarial: the basic one, the AutoAugment one, or both.

Hardware: a TPU pod slice. Published: it helps small networks most; the numbers are not at hand.
Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"size": tuple(f"b{i}" for i in range(9)), "attacked": ("basic", "autoaugment", "both")}


def get_config(variant: str = ""):
  """`variant`: a size and what is attacked, such as "b0,both"."""
  chosen = choose(variant, CHOICES)
  config = imagenet_efficientnet.get_config(chosen["size"])
  config.scheme = "fine_grained"
  config.data.augment, config.data.second_augment = "crop_flip", "autoaugment"
  config.loss.weights.adversarial = float(chosen["attacked"] != "autoaugment")
  config.loss.weights.adversarial_second = float(chosen["attacked"] != "basic")
  return config
