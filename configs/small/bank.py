"""What the batch norms of the domains share, on small images.

  python -m advprop_jax.main --config=configs/small/bank.py:shared=affine --workdir=DIR

Hardware: a laptop, or one GPU. Results: README.md in this folder.
"""

from advprop_jax.runtime.variants import choose
from configs.small import schemes

CHOICES = {"shared": ("statistics", "affine", "both", "nothing"),
           "network": schemes.CHOICES["network"], "data": schemes.CHOICES["data"]}


def get_config(variant: str = ""):
  """`variant`: what is shared, a network and the data, such as "affine,cifar10"."""
  chosen = choose(variant, CHOICES)
  config = schemes.get_config(f"{chosen['network']},{chosen['data']}")
  config.model.share_statistics = chosen["shared"] in ("statistics", "both")
  config.model.share_affine = chosen["shared"] in ("affine", "both")
  return config
