"""The model card of an exported network: Markdown with the front matter of the Hugging Face hub."""

import os

import jax
import ml_collections

from advprop_jax import __version__
from advprop_jax.experiment import training_attack
from advprop_jax.models.conventions import CONVENTIONS
from advprop_jax.results import results_table
from advprop_jax.runtime.config import create_scheme
from advprop_jax.runtime.metrics import read_json
from advprop_jax.trained import TrainedNetwork, public_name

# format -> (library of the hub, what it needs, how to read it in three lines).
_LOADING = {
    "timm": ("timm", "timm", """\
import timm
model = timm.create_model("local-dir:DIRECTORY", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""),
    "stablehlo": ("jax", "jax flatbuffers", """\
import jax.export, pathlib
network = jax.export.deserialize(pathlib.Path("DIRECTORY/model.stablehlo").read_bytes())
logits = jax.jit(network.call)(images)  # uint8 (n, SIZE, SIZE, 3), RGB
"""),
    "checkpoint": ("advprop_jax", "-r requirements.txt", """\
from advprop_jax.trained import read_exported
network = read_exported("DIRECTORY")
logits = network.model.apply(network.deployed, images)  # float32 (n, SIZE, SIZE, 3), in [-1, 1]
"""),
}


def model_card(network: TrainedNetwork, kind: str, workdir: str) -> str:
  """What one has to know of an exported network.

  Args:
    network: what is exported.
    kind: the export's format.
    workdir: of the run that trained it: its results, if they are of the step that is exported.

  Returns:
    Markdown. Nothing in it is a guess: what is not known is not said.
  """
  library, needed, loading = _LOADING[kind]
  loading = loading.replace("SIZE", str(network.image_size))
  facts = {**_network_facts(network), **(_training_facts(network) if network.config else {})}
  rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
  results = "\n\n".join(_results(network, workdir)) or "None were measured by this program."
  scheme = network.config and network.config["scheme"]
  tag = "\n- advprop" if scheme and "advprop" in scheme else ""
  origin = ("Only the main batch norms are kept: it is the\nstandard network." if scheme else
            "It did not train this network: the\nweights are published ones, as they were found.")
  return f"""---
library_name: {library}
tags:
- image-classification{tag}
---
# {network.name}

Exported by advprop_jax {__version__}, a program for
[AdvProp](https://arxiv.org/abs/1911.09665). {origin}

| | |
|---|---|
{rows}

## Results

{results}

## Loading

`pip install {needed}`, and with the folder of this file in the place of DIRECTORY:

```python
{loading}```
"""


def _network_facts(network: TrainedNetwork) -> dict[str, str]:
  parameters = sum(leaf.size for leaf in jax.tree.leaves(network.deployed["params"]))
  convention = CONVENTIONS[network.convention]
  return {
      "network": network.name,
      "parameters": f"{parameters:,}",
      "classes": f"{network.num_classes}",
      "images": f"{network.image_size} x {network.image_size} RGB, the central "
                f"{network.crop_fraction:.3g} of the shorter side, bicubic",
      "normalisation": f"mean {_brief(convention.mean)}, standard deviation "
                       f"{_brief(convention.std)}, of pixels / 255",
      "weights": network.source}


def _training_facts(network: TrainedNetwork) -> dict[str, str]:
  config = ml_collections.ConfigDict(network.config)
  scheme, attack = create_scheme(config), training_attack(config, 1)
  settings, start = config.optimizer, config.model.pretrained
  facts = {
      "scheme": f"{config.scheme}: {scheme}",
      "attack": f"{attack} (0-255 units), {attack.statistics} statistics",
      "data": f"{config.data.name}, {config.data.train_split}; crop {config.data.crop}, "
              f"augmentation {config.data.augment}",
      "training": f"{network.step:,} updates of {config.data.batch_size} images, {settings.name}, "
                  f"learning rate {settings.learning_rate:g}, {settings.schedule}; trained: "
                  f"{settings.trainable}; seed {config.seed}",
      "started from": start and public_name(start)}
  if not any(part.attacked for part in scheme.made):
    del facts["attack"]
  return {name: value for name, value in facts.items() if value is not None}


def _results(network: TrainedNetwork, workdir: str):
  """Tables of the run's results on the very weights that are exported."""
  for name in ("summary.json", "evaluation.json"):
    summary = read_json(os.path.join(workdir, name))
    if network.config and summary.get("step") == network.step and (
        summary["weights"] in network.source):
      yield f"```\n{results_table(summary)}\n```"


def _brief(values: tuple[float, ...]) -> str:
  return " ".join(f"{value:.4g}" for value in dict.fromkeys(values))
