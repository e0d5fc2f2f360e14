"""EfficientNet-tiny with AdvProp on the bundled Fashion-MNIST subset: the whole thing in minutes.

  python -m advprop_jax.main --config=configs/quickstart.py --workdir=DIR
  python -m advprop_jax.main --config=configs/quickstart.py:scheme=vanilla --workdir=DIR2

Hardware: a laptop; the README has times and accuracies as measured on 2 CPU cores.
"""

from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose

CHOICES = {"scheme": ("advprop", "vanilla")}


def get_config(variant: str = ""):
  """`variant`: scheme=advprop or scheme=vanilla."""
  config = default_config()
  config.scheme = choose(variant, CHOICES)["scheme"]
  config.model.name = "efficientnet_tiny"
  config.model.dropout_rate = 0.0  # four epochs are too few to over-fit
  config.model.drop_path_rate = 0.0
  config.attack.epsilon = 2.0
  config.attack.step_size = 2.0
  config.attack.num_steps = 1
  config.data.batch_size = 64
  config.data.padding = 0  # flips alone: the clothes are centred and fill the picture
  config.optimizer.name = "adamw"
  config.optimizer.weight_decay_form = "decoupled"
  config.optimizer.weight_decay = 0.02
  config.optimizer.learning_rate = 0.005
  config.optimizer.epsilon = 1e-8
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_epochs = 0.5
  config.train.epochs = 4.0
  config.train.ema_decay = 0.99
  config.train.log_every = 10
  config.eval.benchmarks = "clean,adversarial,auxiliary,strength,corruptions"
  config.eval.corrupted_images = 400  # each 75 times
  return config
