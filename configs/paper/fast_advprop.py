"""Fast AdvProp (Mei et al., ICLR 2022): AdvProp at the cost of vanilla training, ResNets.

  python -m advprop_jax.main --config=configs/paper/fast_advprop.py:resnet50 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

One image in five is adversarial, epsilon 1, one step; 105 epochs of vanilla training are 87.5 here.
Batches are 320 images for the 256 clean ones of scripts/run_fastadvprop.sh in
meijieru/fast_advprop, which divides the learning rate by 10 at 30, 60, 90 and 100 epochs; here it
follows a cosine.

Hardware: a TPU pod slice. Published: the numbers are not at hand. Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs.paper import resnet

CHOICES = {"network": ("resnet50", "resnet101", "resnet152", "resnet200")}


def get_config(variant: str = ""):
  """`variant`: a network."""
  config = resnet.get_config(choose(variant, CHOICES)["network"])
  config.scheme = "fast_advprop"
  config.attack.epsilon = config.attack.step_size = 1.0
  config.attack.num_steps = 1
  config.attack.statistics = "batch"
  config.data.batch_size = 1280
  return config
