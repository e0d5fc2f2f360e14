"""Attack strength against network size: epsilon 1 to 4 for EfficientNet B0 to B7.

  python -m advprop_jax.main --config=configs/paper/attack_strength.py:b0,epsilon=4 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published: small networks are best with
weak attackers (B0 to B2 with epsilon 1), large ones with strong ones (B4 to B7 with epsilon 4);
from memory of the paper, and the numbers are not at hand. Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"size": tuple(f"b{i}" for i in range(8)), "epsilon": ("1", "2", "3", "4"),
           "chips": imagenet_efficientnet.CHIPS}


def get_config(variant: str = ""):
  """`variant`: a size, an epsilon and a number of chips, such as "b3,epsilon=2,chips=128"."""
  chosen = choose(variant, CHOICES)
  config = imagenet_efficientnet.recipe(chosen["size"], int(chosen["chips"]))
  imagenet_efficientnet.set_attack(config, int(chosen["epsilon"]))
  return config
