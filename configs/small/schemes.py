"""Every scheme on small images: vanilla, Madry, joint, AdvProp, fine-grained and Fast AdvProp.

  python -m advprop_jax.main --config=configs/small/schemes.py:scheme=joint --workdir=DIR
  python -m advprop_jax.main --config=configs/small/schemes.py:joint,resnet_tiny,cifar10 \
      --config.data.dir=FOLDER_WITH_train_AND_test --workdir=DIR

Hardware: a laptop, or one GPU. Results: README.md in this folder.
"""

from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose

CHOICES = {
    "scheme": ("advprop", "vanilla", "adversarial", "joint", "fine_grained", "fast_advprop"),
    "network": ("efficientnet_tiny", "resnet_tiny"),
    "data": ("bundled", "cifar10"),
}


def get_config(variant: str = ""):
  """`variant`: a scheme, a network and the data, such as "joint,resnet_tiny,cifar10"."""
  chosen = choose(variant, CHOICES)
  config = default_config()
  config.scheme = chosen["scheme"]
  config.model.name = chosen["network"]
  config.model.dropout_rate = config.model.drop_path_rate = 0.0  # few epochs do not over-fit
  config.attack.epsilon = config.attack.step_size = 2.0
  config.attack.num_steps = 1
  config.data.batch_size = 64
  if chosen["data"] == "cifar10":
    config.data.name = "folder"
    config.data.image_size = 32
  else:
    config.data.image_size = 28
    config.data.padding = 0
  config.optimizer.name = "adamw"
  config.optimizer.weight_decay_form = "decoupled"
  config.optimizer.weight_decay = 0.02
  config.optimizer.learning_rate = 0.005
  config.optimizer.epsilon = 1e-8
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_epochs = 0.5
  config.train.epochs = 4.0 if chosen["data"] == "bundled" else 2.0
  config.train.ema_decay = 0.99
  config.eval.num_steps, config.eval.step_size = 5, 1.0  # the paper's attack, at this epsilon
  if config.scheme == "fine_grained":
    config.data.second_augment = "autoaugment"
  if config.scheme == "fast_advprop":
    config.attack.statistics, config.attack.dropout = "batch", True  # its pass trains too
    config.data.batch_size = 65  # four clean images for each adversarial one
  return config
