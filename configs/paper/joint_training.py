"""Is the auxiliary batch norm what helps? Joint training, with one shared one, against AdvProp.

  python -m advprop_jax.main --config=configs/paper/joint_training.py:b0,scheme=joint \
      --workdir=DIR --config.data.dir=DIRECTORY_OF_TFDS_DATA

`adversarial` trains on adversarial images alone (Madry et al., ICLR 2018).

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published top-1 of AdvProp, B0 to B7:
77.6 79.6 80.5 81.9 83.3 84.3 84.8 85.2; joint training is below vanilla, most for small networks
(from memory; the numbers are not at hand). Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet

CHOICES = {"size": tuple(f"b{i}" for i in range(8)),
           "scheme": ("joint", "advprop", "vanilla", "adversarial"),
           "chips": imagenet_efficientnet.CHIPS}


def get_config(variant: str = ""):
  """`variant`: a size, a scheme and a number of chips, such as "b0,joint,chips=128"."""
  chosen = choose(variant, CHOICES)
  config = imagenet_efficientnet.get_config(f"{chosen['size']},chips={chosen['chips']}")
  config.scheme = chosen["scheme"]
  return config
