"""Fast AdvProp (Mei et al., ICLR 2022): AdvProp at the cost of vanilla training, ResNets.

  python -m advprop_jax.main --config=configs/paper/fast_advprop.py:resnet50 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

One image in five is adversarial, epsilon 1, one step; 105 epochs of vanilla training are 87.5 here.
The weights and these numbers are those of scripts/run_fastadvprop.sh in meijieru/fast_advprop; the
training itself is that of resnet.py beside this file, with batches of 1280 (1024 clean images).
Batch norms see the images of 8 replicas, so that few adversarial ones are enough.

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
  config.attack.dropout = True  # the attack's pass is one of training
  config.model.bn_group_size = 8
  config.data.batch_size = 1280
  return config
