"""PGD, I-FGSM, GD and FGSM on small images.

  python -m advprop_jax.main --config=configs/small/attackers.py:attack=gd --workdir=DIR

Hardware: a laptop, or one GPU. Results: README.md in this folder.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet
from configs.small import schemes

CHOICES = {"attack": ("pgd", "ifgsm", "gd", "fgsm"), "network": schemes.CHOICES["network"],
           "data": schemes.CHOICES["data"]}


def get_config(variant: str = ""):
  """`variant`: an attacker, a network and the data, such as "gd,cifar10"."""
  chosen = choose(variant, CHOICES)
  config = schemes.get_config(f"{chosen['network']},{chosen['data']}")
  imagenet_efficientnet.set_attack(config, 2)
  config.attack.name = chosen["attack"]
  config.eval.attack = "pgd"
  return config
