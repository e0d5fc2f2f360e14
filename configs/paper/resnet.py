"""ResNet-50, 101, 152 and 200 with and without AdvProp.

  python -m advprop_jax.main --config=configs/paper/resnet.py:resnet50,scheme=vanilla \
      --workdir=DIR --config.data.dir=DIRECTORY_OF_TFDS_DATA

The training of configs/imagenet_resnet.py, for the 105 epochs of Fast AdvProp, whose base it is.

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published top-1, vanilla -> AdvProp: 50
76.7 -> 77.4, 101 78.3 -> 79.2, 152 79.0 -> 79.8, 200 79.3 -> 80.1 (from memory of the paper). Here:
not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_resnet

CHOICES = {"network": tuple(f"resnet{depth}" for depth in imagenet_resnet.AT_ONCE),
           "scheme": ("advprop", "vanilla"), "chips": imagenet_resnet.CHIPS}


def get_config(variant: str = ""):
  """`variant`: a network, a scheme and a number of chips, such as "resnet152,vanilla,chips=32"."""
  chosen = choose(variant, CHOICES)
  depth = chosen["network"].removeprefix("resnet")
  config = imagenet_resnet.recipe(depth, int(chosen["chips"]))
  config.scheme = chosen["scheme"]
  config.train.epochs = 105.0
  return config
