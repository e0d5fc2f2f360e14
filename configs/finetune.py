"""AdvProp for a few epochs from published weights, on your own photographs.

  python -m advprop_jax.main --config=configs/finetune.py:b0 --workdir=DIR \
      --config.data.dir=FOLDER_WITH_train_AND_test
  python -m advprop_jax.main --config=configs/finetune.py:lite0,norms_and_classifier --workdir=DIR \
      --config.data.dir=FOLDER --config.model.pretrained=FILE.pth

The weights are fetched from the Hugging Face hub, or are those of config.model.pretrained. Every
auxiliary batch norm starts as a copy of the main one; the classifier starts fresh unless the
classes are those of the weights.

Hardware: one GPU; a laptop for small data. Accuracy: not run. Learning rate and epochs are common
ones for fine-tuning, not the paper's, which has no such experiment.
"""

from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose

# Those of AdvProp where they are published, which is for B0 to B8.
WEIGHTS = {
    **{f"b{i}": (f"efficientnet_b{i}", f"timm/tf_efficientnet_b{i}.ap_in1k")
       for i in range(9)},
    **{f"lite{i}": (f"efficientnet_lite{i}", f"timm/tf_efficientnet_lite{i}.in1k")
       for i in range(5)},
    **{name: (name, f"timm/{name}.tv_in1k")
       for name in ("resnet50", "resnet101", "resnet152")},
}
CHOICES = {
    "weights": tuple(WEIGHTS),
    "trainable": ("all", "norms_and_classifier"),
    "scheme": ("advprop", "vanilla"),
}


def get_config(variant: str = ""):
  """`variant`: weights, what is trained, a scheme, such as "b3,norms_and_classifier"."""
  chosen = choose(variant, CHOICES)
  config = default_config()
  config.scheme = chosen["scheme"]
  config.model.name, config.model.pretrained = WEIGHTS[chosen["weights"]]
  # As weak as for the small networks of the paper: a pretrained network has little to forget.
  config.attack.epsilon = config.attack.step_size = 1.0
  config.attack.num_steps = 1
  config.data.name = "folder"
  config.data.batch_size = 64
  config.data.padding = 16
  config.optimizer.name = "sgd"
  config.optimizer.nesterov = True
  config.optimizer.trainable = chosen["trainable"]
  config.optimizer.learning_rate = 0.01 * config.data.batch_size / 256
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_epochs = 0.5
  config.train.epochs = 5.0
  config.train.ema_decay = 0.99
  config.train.log_every = 10
  config.eval.batch_size = 64
  return config
