"""What a bank of batch norms learned: how far its domains lie apart, layer by layer.

For each layer, with m, v the running mean and variance, s, b the scale and bias, and C channels:

    mean        1/C sum |m_aux - m_main| / sqrt(v_main + epsilon)
    variance    1/C sum |ln((v_aux + epsilon) / (v_main + epsilon))|
    scale       1/C sum |s_aux - s_main| / rms(s_main)
    bias        1/C sum |b_aux - b_main| / rms(s_main)

None of them changes when the layer's input is multiplied by a number, or all of scale and bias are.
Means are in standard deviations of the layer's input, scale and bias in those of its output, which
is s times an input of variance 1. (A logarithm of scales would be infinite where one is 0, as those
of ResNet's last norms are at first.)
"""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from advprop_jax.errors import InputError
from advprop_jax.figures.page import Section, listed
from advprop_jax.figures.runs import Group, average
from advprop_jax.figures.style import DASHES, INK, Panel, draw, look
from advprop_jax.models.batch_norm import BatchNorm, statistics_collection
from advprop_jax.models.network import Network
from advprop_jax.runtime.config import create_network, create_scheme
from advprop_jax.trained import TrainedNetwork

MEAN, VARIANCE, SCALE, BIAS = "mean", "variance", "scale", "bias"
UNITS = {MEAN: "|difference| / main std", VARIANCE: "|ln of ratio|",
         SCALE: "|difference| / rms scale", BIAS: "|difference| / rms scale"}
MOST_CHANNELS = 150     # of a layer in a scatter plot
SHARED = {MEAN: "share_statistics", VARIANCE: "share_statistics", SCALE: "share_affine",
          BIAS: "share_affine"}
Layer = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Bank:
  """The batch norms of one trained network.

  Attributes:
    layers: where they are, in the order in which an image goes through them.
    domains: the main one first.
    parameters: {domain: {MEAN, ...: one array (channels,) for each layer}}; what domains share
      stands under the main one alone.
    epsilon: added to variances.
  """

  layers: tuple[Layer, ...]
  domains: tuple[str, ...]
  parameters: Mapping[str, Mapping[str, list[np.ndarray]]]
  epsilon: float

  def shared(self, kind: str) -> bool:
    return all(kind not in self.parameters[domain] for domain in self.domains[1:])


def read_bank(network: TrainedNetwork) -> Bank:
  """The bank of a run's network, all of its domains."""
  model = create_network(network.config, network.num_classes).clone(remat=False)
  return bank_of(model, network.variables)


def bank_of(model: Network, variables: Mapping) -> Bank:
  """The bank of a model's variables."""
  layers = layer_order(model)

  def leaves(collection, name):
    found = []
    for layer in layers:
      leaf = variables[collection]
      for key in (*layer, name):
        leaf = leaf[key]
      found.append(np.asarray(leaf))
    return found

  parameters = {}
  for domain in model.domains:
    main, own = domain == model.domains[0], {}
    if main or not model.share_statistics:
      collection = statistics_collection(domain, model.domains)
      own |= {MEAN: leaves(collection, "mean"), VARIANCE: leaves(collection, "var")}
    if main or not model.share_affine:
      suffix = "" if main else f"_{domain}"
      own |= {SCALE: leaves("params", "scale" + suffix), BIAS: leaves("params", "bias" + suffix)}
    parameters[domain] = own
  return Bank(layers, tuple(model.domains), parameters, model.norm_epsilon)


def layer_order(model: Network) -> tuple[Layer, ...]:
  """Paths of all banks of a network, in the order in which an image goes through them."""
  layers = []

  def listen(call, args, kwargs, context):
    if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
      layers.append(context.module.path)
    return call(*args, **kwargs)

  with nn.intercept_methods(listen):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return tuple(dict.fromkeys(layers))


def distances(bank: Bank, domain: str) -> dict[str, np.ndarray]:
  """How far a domain is from the main one, {MEAN, ...: (layers,)}, of what they do not share.

  NaN for scale and bias of a layer whose main scales are all 0.
  """
  main, other = bank.parameters[bank.domains[0]], bank.parameters[domain]
  result = {}
  for kind in other:
    values = []
    for layer in range(len(bank.layers)):
      ours, theirs = main[kind][layer], other[kind][layer]
      if kind == VARIANCE:
        apart = np.log((theirs + bank.epsilon) / (ours + bank.epsilon))
      elif kind == MEAN:
        apart = (theirs - ours) / np.sqrt(main[VARIANCE][layer] + bank.epsilon)
      else:
        unit = np.sqrt(np.mean(np.square(main[SCALE][layer])))
        apart = (theirs - ours) / unit if unit > 0 else np.full_like(ours, np.nan)
      values.append(float(np.mean(np.abs(apart))))
    result[kind] = np.array(values)
  return result


def section(groups: Sequence[Group], networks: Mapping[str, TrainedNetwork | str],
            network: str = "") -> Section:
  """The figures of the banks.

  Args:
    groups: those whose networks have one domain are passed over.
    networks: {name of a run: its network, or why it cannot be read}.
    network: of the groups, if there are several on the page.
  """
  title = f"What the batch norms learned{network and f': {network}'}"
  banks, unread = {}, []
  for group in filter(has_bank, groups):
    found = []
    for run in group.runs:
      trained = networks[run.name]
      try:
        if isinstance(trained, str):
          raise InputError(trained)
        found.append(read_bank(trained))
      except InputError as error:
        unread.append(f"{run.name}: {error}")
    if found:
      banks[group] = found
  if not banks:
    why = "; ".join(unread) or ("no run has auxiliary batch norms; those of schemes such as "
                                "advprop have, see configs/quickstart.py")
    return Section(title, reason=why + ".")
  first = next(iter(banks))
  # Scale and bias have one unit, and so one scale.
  top = 1.05 * max((float(np.nanmax(distances(bank, domain)[kind], initial=0))
                    for own in banks.values() for bank in own for domain in bank.domains[1:]
                    for kind in (SCALE, BIAS) if not bank.shared(kind)), default=0)
  kinds = {kind: _distance_panel(kind, banks, top if kind in (SCALE, BIAS) else 0)
           for kind in UNITS}
  scatters = [_scatter_panel(kind, first, banks[first][0], domain)
              for domain in banks[first][0].domains[1:] for kind in UNITS
              if not banks[first][0].shared(kind)]
  panels = [dataclasses.replace(panel, name=panel.name + (network and f"_{network}"))
            for panel in (*kinds.values(), *scatters)]
  return Section(title, _captions(banks, first, unread), panels)


def has_bank(group: Group) -> bool:
  """Whether its networks have batch norms besides the main ones."""
  return len(create_scheme(group.first.full_config).domains) > 1


def _captions(banks, first, unread) -> list[str]:
  bank = banks[first][0]
  names = [_name(bank.layers[place]) for place in _shown(bank)]
  seeds = max(map(len, banks.values()))
  captions = [
      "How far the auxiliary batch norms lie from the main ones, layer by layer in the order in "
      f"which an image goes through them ({len(bank.layers)} in {first.network}): 0 means equal. "
      "Each value is a mean over the channels of the layer: of |difference of running means| / "
      "sqrt(main variance + epsilon); of |ln of the ratio of the variances|, epsilon added to "
      "both; of |difference of scales| and |difference of biases|, both / root mean square of the "
      f"layer's main scales. All are free of units; epsilon is the network's, {bank.epsilon:g}. "
      "The variables are those of the newest checkpoint, moving averages where the run keeps "
      "them." + (" Lines are means over seeds, bands one standard error." if seeds > 1 else ""),
      _furthest(banks),
      f"Below them, channel by channel: the main and the auxiliary value in three layers of "
      f"{first.first.name} ({listed(names)}; of a layer at most {MOST_CHANNELS} channels, evenly "
      "spread). A point on the line is a channel in which both are equal."]
  return [*captions, *(f"Not read: {why}." for why in unread)]


def _furthest(banks: Mapping[Group, Sequence[Bank]]) -> str:
  """Which layers are furthest apart, for the caption."""
  said = []
  for group, own in banks.items():
    for domain in own[0].domains[1:]:
      means = {kind: np.mean([distances(bank, domain)[kind] for bank in own], axis=0)
               for kind in UNITS if not own[0].shared(kind)}
      words = [f"{kind} {value[place]:.2g} in {_name(own[0].layers[place])}"
               for kind, value in means.items() if np.isfinite(value).any()
               for place in [np.nanargmax(value)]]
      said.append(f"{group.name}, {domain.replace('_', ' ')}: {listed(words) or 'all is shared'}")
  return f"Largest distances. {'; '.join(said)}."


def _distance_panel(kind: str, banks: Mapping[Group, Sequence[Bank]], top: float) -> Panel:
  """Of one kind; `top` is the end of the y axis, 0 for its own."""
  said = []

  def plot(axes):
    for group, own in banks.items():
      style = look(group)
      for number, domain in enumerate(own[0].domains[1:]):
        if own[0].shared(kind):
          axes.text(0.5, 0.8 - 0.2 * len(said), f"{group.name}: shared by all domains\n"
                    f"(model.{SHARED[kind]}=True)", transform=axes.transAxes, ha="center",
                    va="center")
          said.append(f"{group.name}: shared by all domains")
          break
        values = np.array([distances(bank, domain)[kind] for bank in own])
        estimates = [average(list(column)) for column in values.T]
        mean, places = np.array([each for each, _ in estimates]), np.arange(1, values.shape[1] + 1)
        axes.plot(places, mean, color=style.colour, marker=style.marker,
                  linestyle=DASHES[(number + group.place) % len(DASHES)],
                  markerfacecolor="white" if number else style.colour,
                  label=f"{group.name}, {domain.replace('_', ' ')}")
        if len(own) > 1:
          error = np.array([each for _, each in estimates])
          axes.fill_between(places, mean - error, mean + error, color=style.colour, alpha=0.18,
                            linewidth=0)
        said.append(f"{group.name}, {domain}: from {np.nanmin(mean):.2g} to "
                    f"{np.nanmax(mean):.2g}, largest in layer {np.nanargmax(mean) + 1}"
                    if np.isfinite(mean).any() else f"{group.name}, {domain}: undefined")
    axes.set(xlabel="batch norm, in the order of the forward pass", ylabel=UNITS[kind])
    axes.set_xlim(left=0)
    axes.set_ylim(0, top or None)

  title = f"Main to auxiliary: {kind}"
  panel = draw(f"bank_{kind}", title, "", plot, legend=[
      f"{group.name}, {domain.replace('_', ' ')}" for group, own in banks.items()
      for domain in own[0].domains[1:] if not own[0].shared(kind)])
  return dataclasses.replace(panel, alt=f"{title}, distance by layer. {'; '.join(said)}.")


def _scatter_panel(kind: str, group: Group, bank: Bank, domain: str) -> Panel:
  ours, theirs = bank.parameters[bank.domains[0]][kind], bank.parameters[domain][kind]

  def plot(axes):
    limits = []
    for place, marker, colour in zip(_shown(bank), "o^s", ("#0072b2", "#e69f00", INK),
                                     strict=False):
      channels = spread(len(ours[place]), MOST_CHANNELS)
      x, y = ours[place][channels], theirs[place][channels]
      axes.plot(x, y, marker, color=colour, markersize=3.5, alpha=0.75, markeredgewidth=0.7,
                markerfacecolor="none", label=labels[place])
      limits += [x.min(), y.min(), x.max(), y.max()]
    low, high = min(limits), max(limits)
    if kind == VARIANCE and low > 0:
      axes.set(xscale="log", yscale="log")
    axes.plot([low, high], [low, high], color="#555555", linewidth=0.8)
    axes.set(xlabel=f"main {kind}", ylabel=f"{domain.replace('_', ' ')} {kind}")

  several = f"_{domain}" if len(bank.domains) > 2 else ""
  places = [place + 1 for place in _shown(bank)]
  labels = {place: f"{place + 1}: {_name(bank.layers[place])}" for place in _shown(bank)}
  return draw(f"channels_{kind}{several}", f"Each channel: {kind}",
              f"Scatter plot, {kind} of each channel through the main (x) and the {domain} (y) "
              f"batch norm of {group.first.name}, layers {listed(list(map(str, places)))}.", plot,
              legend=list(labels.values()))


def spread(number: int, most: int) -> np.ndarray:
  """At most so many of the places 0 ... number - 1, evenly spread."""
  return np.unique(np.linspace(0, number - 1, min(number, most)).astype(int))


def _shown(bank: Bank) -> list[int]:
  last = len(bank.layers) - 1
  return sorted({0, last // 2, last})


def _name(layer: Layer) -> str:
  return " ".join(layer).replace("_", " ")
