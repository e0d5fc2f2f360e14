"""Which part of the batch norms has to be separate? Statistics, scale and bias, or both.

  python -m advprop_jax.main --config=configs/paper/bank.py:b0,shared=statistics --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

`shared=statistics` keeps scale and bias separate, `shared=affine` the statistics, and
`shared=both` is joint training.

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published: two later papers find that
separate scale and bias do more than separate statistics; on other networks, so there is no number
to compare with. Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"size": tuple(f"b{i}" for i in range(9)),
           "shared": ("statistics", "affine", "both", "nothing"),
           "chips": imagenet_efficientnet.CHIPS}


def get_config(variant: str = ""):
  """`variant`: a size, what the domains share and a number of chips, such as "b0,affine"."""
  chosen = choose(variant, CHOICES)
  config = imagenet_efficientnet.get_config(f"{chosen['size']},chips={chosen['chips']}")
  config.model.share_statistics = chosen["shared"] in ("statistics", "both")
  config.model.share_affine = chosen["shared"] in ("affine", "both")
  return config
