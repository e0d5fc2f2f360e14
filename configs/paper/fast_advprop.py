"""Fast AdvProp (Mei et al., ICLR 2022): AdvProp at the cost of vanilla training, ResNets.

  python -m advprop_jax.main --config=configs/paper/fast_advprop.py:resnet50 --workdir=DIR \
      --config.data.dir=DIRECTORY_OF_TFDS_DATA

One image in five is adversarial, epsilon 1, one step; 105 epochs of vanilla training are 87.5 here.
The weights and these numbers are those of scripts/run_fastadvprop.sh in meijieru/fast_advprop; the
training itself is that of resnet.py beside this file, with batches of 1280 (1024 clean images).
Batch norms see the images of at least 8 replicas, so that few adversarial ones are enough.

Hardware: `chips` TPU chips or GPUs of 16 GB, 8 unless said. Published: the numbers are not at hand.
Here: not run.
"""

from advprop_jax.runtime.variants import choose
from configs import imagenet_efficientnet
from configs.paper import resnet

# With more, a replica would have no adversarial image.
CHIPS = tuple(chips for chips in imagenet_efficientnet.CHIPS if int(chips) <= 256)
CHOICES = {"network": resnet.CHOICES["network"], "chips": CHIPS}


def get_config(variant: str = ""):
  """`variant`: a network and a number of chips, such as "resnet50,chips=32"."""
  chosen = choose(variant, CHOICES)
  config = resnet.get_config(f"{chosen['network']},chips={chosen['chips']}")
  config.scheme = "fast_advprop"
  config.attack.epsilon = config.attack.step_size = 1.0
  config.attack.num_steps = 1
  config.attack.statistics = "batch"
  config.attack.dropout = True  # the attack's pass is one of training
  config.model.bn_group_size = max(config.model.bn_group_size, min(8, int(chosen["chips"])))
  config.data.batch_size = 1280
  return config
