"""Attack strength on small images: epsilon 1 to 8, the steps of the paper.

  python -m advprop_jax.main --config=configs/small/strength.py:epsilon=4 --workdir=DIR

Hardware: a laptop, or one GPU. Results: README.md in this folder.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet
from configs.small import schemes

CHOICES = {"epsilon": ("1", "2", "3", "4", "8"), "network": schemes.CHOICES["network"],
           "data": schemes.CHOICES["data"]}


def get_config(variant: str = ""):
  """`variant`: an epsilon, a network and the data, such as "epsilon=4,cifar10"."""
  chosen = choose(variant, CHOICES)
  config = schemes.get_config(f"{chosen['network']},{chosen['data']}")
  imagenet_efficientnet.set_attack(config, int(chosen["epsilon"]))
  # One attack for all of them to be measured with.
  config.eval.epsilon, config.eval.step_size, config.eval.num_steps = 4.0, 1.0, 5
  return config
