"""Other attackers than PGD: I-FGSM has no random start, GD neither start nor ball.

  python -m advprop_jax.main --config=configs/paper/attackers.py:b3,attack=ifgsm --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published: all three help, and which
one hardly matters; from memory of the paper, and the numbers are not at hand. Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"size": tuple(f"b{i}" for i in range(8)), "attack": ("pgd", "ifgsm", "gd"),
           "chips": imagenet_efficientnet.CHIPS}


def get_config(variant: str = ""):
  """`variant`: a size, an attacker and a number of chips, such as "b3,gd,chips=128"."""
  chosen = choose(variant, CHOICES)
  config = imagenet_efficientnet.get_config(f"{chosen['size']},chips={chosen['chips']}")
  config.attack.name = chosen["attack"]
  config.eval.attack = "pgd"  # one for all to be measured with
  return config
