"""A run of two steps of the network of one block, and weights for it, for tests of what follows."""

import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax import models
from advprop_jax.runtime.config import default_config
from tests import one_block


def make_config(changes=None, **more):
  """A config of that run, with other fields as given: {"section.field": value}."""
  one_block.register()
  config = default_config()
  settings = {"model.name": "one_block", "scheme": "advprop", "data.train_split": "train[:40]",
              "data.test_split": "test[:12]", "data.batch_size": 20, "eval.batch_size": 12,
              "attack.num_steps": 1, "train.steps": 2, **(changes or {}), **more}
  for path, value in settings.items():
    *sections, name = path.split(".")
    section = config
    for key in sections:
      section = section[key]
    section[name] = value
  return config


def random_variables(classes=10, domains=("clean",)):
  """Of the network of one block, as float32 numpy arrays."""
  one_block.register()
  model = models.create_model("one_block", classes, domains)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
  rng = np.random.default_rng(classes)
  return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)
