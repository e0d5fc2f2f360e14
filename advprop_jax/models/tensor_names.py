"""What published weights call the modules of our networks.

Two dialects: `timm` (timm and torchvision; ResNets and EfficientNets), and `efficientnet_pytorch`
(lukemelas/EfficientNet-PyTorch and its children, EfficientNets alone).
"""

from collections.abc import Callable, Iterator, Mapping

from advprop_jax.models import architecture_of, efficientnet, resnet

_EFFICIENTNET = {
    "stem": "conv_stem",
    "stem_norm": "bn1",
    "head": "conv_head",
    "head_norm": "bn2",
    "classifier": "classifier",
}
_SQUEEZE_EXCITE = {
    "squeeze_excite/reduce": "se.conv_reduce",
    "squeeze_excite/expand": "se.conv_expand",
}
_BLOCK = {
    "expand": "conv_pw",
    "expand_norm": "bn1",
    "depthwise": "conv_dw",
    "depthwise_norm": "bn2",
    "project": "conv_pwl",
    "project_norm": "bn3",
    **_SQUEEZE_EXCITE,
}
_BLOCK_WITHOUT_EXPANSION = {
    "depthwise": "conv_dw",
    "depthwise_norm": "bn1",
    "project": "conv_pw",
    "project_norm": "bn2",
    **_SQUEEZE_EXCITE,
}
_RESNET = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "classifier": "fc",
}
_RESNET_BLOCK = {
    "conv_1": "conv1",
    "norm_1": "bn1",
    "conv_2": "conv2",
    "norm_2": "bn2",
    "conv_3": "conv3",
    "norm_3": "bn3",
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}
_EFFICIENTNET_PYTORCH = {
    "stem": "_conv_stem",
    "stem_norm": "_bn0",
    "head": "_conv_head",
    "head_norm": "_bn1",
    "classifier": "_fc",
}
_EFFICIENTNET_PYTORCH_BLOCK = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "squeeze_excite/reduce": "_se_reduce",
    "squeeze_excite/expand": "_se_expand",
    "project": "_project_conv",
    "project_norm": "_bn2",
}

TIMM = "timm"
EFFICIENTNET_PYTORCH = "efficientnet_pytorch"


def module_names(name: str, dialect: str = TIMM) -> dict[str, str]:
  """{our module: the dialect's}, of every module that a network may have.

  Args:
    name: of the network, as `create_model` takes it.
    dialect: a key of the family's entry in DIALECTS.
  """
  architecture = architecture_of(name)
  return dict(DIALECTS[type(architecture)][dialect](architecture))


def dialect_of(name: str, tensors: Mapping) -> str:
  """The dialect that weights of a network are written in: of whose names most are there."""
  dialects = DIALECTS[type(architecture_of(name))]

  def known(dialect):
    return sum(f"{theirs}.weight" in tensors for theirs in module_names(name, dialect).values())

  return max(dialects, key=known)


def _efficientnet(architecture: efficientnet.Architecture) -> Iterator[tuple[str, str]]:
  yield from _EFFICIENTNET.items()
  for block, stage_index, block_index, stage in efficientnet.block_names(architecture):
    table = _BLOCK_WITHOUT_EXPANSION if stage.expansion == 1 else _BLOCK
    for ours, theirs in table.items():
      yield f"{block}/{ours}", f"blocks.{stage_index}.{block_index}.{theirs}"


def _efficientnet_pytorch(architecture: efficientnet.Architecture) -> Iterator[tuple[str, str]]:
  yield from _EFFICIENTNET_PYTORCH.items()
  for number, (block, _, _, _) in enumerate(efficientnet.block_names(architecture)):
    for ours, theirs in _EFFICIENTNET_PYTORCH_BLOCK.items():
      yield f"{block}/{ours}", f"_blocks.{number}.{theirs}"


def _resnet(architecture: resnet.Architecture) -> Iterator[tuple[str, str]]:
  yield from _RESNET.items()
  for block, stage_index, block_index in resnet.block_names(architecture):
    for ours, theirs in _RESNET_BLOCK.items():
      yield f"{block}/{ours}", f"layer{stage_index + 1}.{block_index}.{theirs}"


# A new family of networks is one more line, a new dialect one more entry of its family's.
Modules = Callable[..., Iterator[tuple[str, str]]]
DIALECTS: dict[type, dict[str, Modules]] = {
    efficientnet.Architecture: {TIMM: _efficientnet, EFFICIENTNET_PYTORCH: _efficientnet_pytorch},
    resnet.Architecture: {TIMM: _resnet},
}
