"""A network of one block, for tests of what does not depend on the network: seconds to compile.

`python -m tests.one_block FLAGS` is `python -m advprop_jax.main FLAGS` with this network known by
the name "one_block".
"""

from advprop_jax import main, models
from advprop_jax.models import efficientnet

ARCHITECTURE = efficientnet.Architecture(
    image_size=28, stem=8, stem_stride=4, head=16, dropout_rate=0.2, drop_path_rate=0.2,
    stages=(efficientnet.Stage(1, 3, 1, 2, 8, 8),))


def create(num_classes: int = 10, domains=("clean", "adversarial"), **settings):
  """The network of one block."""
  return efficientnet.EfficientNet(ARCHITECTURE, num_classes, tuple(domains), **settings)


def register() -> None:
  """Makes "one_block" a name that configs may give."""
  if "one_block" not in models.NAMES:
    models._NETWORKS["one_block"] = (efficientnet.EfficientNet, ARCHITECTURE)
    models.NAMES = (*models.NAMES, "one_block")


if __name__ == "__main__":
  register()
  main.run()
