"""The bank of batch norms: one batch norm per domain in the place of one.

AdvProp's idea in one layer (the paper's auxiliary batch norm): clean and adversarial images
have different statistics, so each *domain* is normalised by its own batch norm while all other
weights are shared. The first domain is the main one; its variables have the names of an ordinary
batch norm, so a network whose other domains are dropped *is* the ordinary network:

    domain        statistics (mean, var)             params
    clean (main)  batch_stats                        scale, bias
    adversarial   batch_stats_adversarial            scale_adversarial, bias_adversarial

Who may change is said by flax's `mutable`, and by nothing else:

    logits, updates = model.apply(variables, images, domains=("adversarial",), train=True,
                                  mutable=["batch_stats_adversarial"])
    logits = model.apply(variables, images, domains=("adversarial",), train=True)   # no trace
    logits = model.apply(variables, images)                                         # deployment
"""

import functools
import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from advprop_jax.models.channels import channel_sums, once
from advprop_jax.models.parameter import parameter
from advprop_jax.models.precision import wide


class BatchNorm(nn.Module):
  """A bank of batch norms over the channels (the last axis).

  Attributes:
    domains: names of the domains; the first is the main one.
    momentum: share of the old running statistics that an update keeps.
    epsilon: added to the variance.
    dtype: type of the result; statistics are float32 whatever it is.
    share_statistics: one mean and variance for all domains (an ablation). Domains of one pass are
      then normalised as one batch.
    share_affine: one scale and bias for all domains (an ablation).
    axis_name: the pmapped axis, needed where group_size is not 1.
    group_size: neighbouring replicas whose batches are normalised as one. 1: each by itself.
    scale_init: initialises the scale of every domain; the bias starts at 0.

  The variance is the biased one, in the normalisation and in the running statistics, as in
  TensorFlow and flax (PyTorch stores the unbiased one).
  """

  domains: tuple[str, ...] = ("clean",)
  momentum: float = 0.99
  epsilon: float = 1e-3
  dtype: jnp.dtype = jnp.float32
  share_statistics: bool = False
  share_affine: bool = False
  axis_name: str | None = None
  group_size: int = 1
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array, domains: Sequence[str], train: bool) -> jax.Array:
    """Normalises x, whose images are those of `domains` in that order, in equal parts.

    Args:
      x: (images, ..., channels).
      domains: whose batch norms to use, without repetition.
      train: normalise by the statistics of this batch, and move the running statistics of those
        domains whose collection is mutable; else by the running statistics.

    Returns:
      An array of x's shape, of type `dtype`.

    Raises:
      ValueError: a domain that the bank lacks or that is named twice, or parts that are not equal.
    """
    check_domains(domains, self.domains, x.shape[0])
    parts, channels = x.reshape(len(domains), -1, *x.shape[1:]), x.shape[-1]

    def each_domain(read, shared):
      if shared:
        return [read(self.domains[0])] * len(domains)
      used = self.domains if self.is_initializing() else domains  # init makes every domain's
      values = {domain: read(domain) for domain in used}
      return [values[domain] for domain in domains]

    def running(domain):
      name = statistics_collection(domain, self.domains)
      return (name, self.variable(name, "mean", jnp.zeros, (channels,), jnp.float32),
              self.variable(name, "var", jnp.ones, (channels,), jnp.float32))

    def affine(domain):
      suffix = _suffix(domain, self.domains)
      return (parameter(self, "scale" + suffix, self.scale_init, (channels,)),
              parameter(self, "bias" + suffix, nn.initializers.zeros, (channels,)))

    statistics = each_domain(running, self.share_statistics)
    scale, bias = map(jnp.stack, zip(*each_domain(affine, self.share_affine), strict=True))
    if train:
      pooled = functools.partial(_pooled, self.share_statistics, self.axis_name,
                                 1 if self.is_initializing() else self.group_size)
      y, mean, var = normalise(parts, scale, bias, self.epsilon, pooled)
      self._update(statistics, mean, var)
    else:
      mean = jnp.stack([mean.value for _, mean, _ in statistics])
      var = jnp.stack([var.value for _, _, var in statistics])
      y = affine_map(parts, mean, scale * jax.lax.rsqrt(var + self.epsilon), bias)
    return y.reshape(x.shape).astype(self.dtype)

  def _update(self, statistics, mean, var):
    """Moves the running statistics of the domains whose collection `mutable` names."""
    updates = {name: (running_mean, running_var, mean[i], var[i])
               for i, (name, running_mean, running_var) in enumerate(statistics)}
    for name, (running_mean, running_var, new_mean, new_var) in updates.items():
      if self.is_mutable_collection(name) and not self.is_initializing():
        running_mean.value = _average(running_mean.value, new_mean, self.momentum)
        running_var.value = _average(running_var.value, new_var, self.momentum)


def affine_map(parts: jax.Array, mean: jax.Array, multiplier: jax.Array,
               bias: jax.Array) -> jax.Array:
  """(parts - mean) * multiplier + bias, in float32.

  Args:
    parts: (domains, images, ..., channels).
    mean, multiplier, bias: (domains, channels) each.
  """
  mean, multiplier, bias = (_per_part(value, parts) for value in (mean, multiplier, bias))
  return (wide(parts) - mean) * multiplier + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(parts: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float,
              pooled: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
  """Parts normalised by their own statistics, and these; no gradient flows through the latter.

  The gradient is written out: it needs two sums over the images and keeps nothing of them but
  parts itself. JAX's own takes 1.8 times as long on the CPU, and three times the memory
  (tests/benchmarks/README.md). Reverse-mode derivatives only.

  Args:
    parts: (domains, images, ..., channels).
    scale: (domains, channels).
    bias: (domains, channels).
    epsilon: added to the variance.
    pooled: (..., domains, channels), means over each part -> means over all that is normalised as
      one; linear, and its own transpose.

  Returns:
    (the shape of parts, mean (domains, channels), biased variance), in float32.

  *Source:* Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv 1502.03167, section 3.
  """
  return _normalise_forward(parts, scale, bias, epsilon, pooled)[0]


def _normalise_forward(parts, scale, bias, epsilon, pooled):
  mean, var = _statistics(parts, pooled)
  deviations = jax.lax.rsqrt(var + epsilon)
  multiplier = scale * deviations
  multiplier, shift = (_per_part(v, parts) for v in (multiplier, bias - mean * multiplier))
  return (wide(parts) * multiplier + shift, mean, var), (parts, scale, mean, deviations)


def _normalise_backward(epsilon, pooled, kept, gradients):
  del epsilon
  parts, scale, mean, deviations = kept  # the last: how many standard deviations one unit is
  gradient, x = once(gradients[0]), wide(parts)
  # Of (parts - mean), without making it: XLA would do so in the forward pass, and keep it.
  of_bias = channel_sums(gradient)
  of_scale = deviations * (channel_sums(gradient * x) - mean * of_bias)
  shift, slope = deviations * pooled(
      scale * jnp.stack([of_bias, of_scale * deviations]) / parts[0, ..., 0].size)
  multiplier, shift, slope = (_per_part(value, parts) for value in (
      scale * deviations, shift - mean * slope, slope))
  return (multiplier * gradient - slope * x - shift).astype(parts.dtype), of_scale, of_bias


normalise.defvjp(_normalise_forward, _normalise_backward)


def _pooled(shared, axis_name, group_size, means):
  """(..., domains, channels) of this replica's parts -> over all that are normalised as one."""
  if shared:
    means = jnp.broadcast_to(jnp.mean(means, -2, keepdims=True), means.shape)
  if group_size > 1:
    means = jax.lax.pmean(means, axis_name, axis_index_groups=_groups(axis_name, group_size))
  return means


def _statistics(parts, pooled):
  """Mean and variance, (domains, channels) each."""
  parts = wide(parts)
  # One mean of both, and so one collective where replicas are normalised as one.
  sums = jnp.stack([channel_sums(parts), channel_sums(parts * parts)])
  mean, mean_of_squares = pooled(sums / parts[0, ..., 0].size)
  return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)


def _per_part(value, parts):
  """(domains, channels) in a shape that goes with parts.

  `once`, or the CPU computes what each channel is multiplied by again for each pixel.
  """
  return once(value).reshape(len(parts), *[1] * (parts.ndim - 2), parts.shape[-1])


def statistics_collection(domain: str, domains: Sequence[str], shared: bool = False) -> str:
  """The collection that holds a domain's running statistics, the name that `mutable` takes.

  Args:
    domain: one of domains.
    domains: all domains of the model; the first is the main one.
    shared: whether the domains share their statistics (`share_statistics`).
  """
  return "batch_stats" if shared else "batch_stats" + _suffix(domain, domains)


def drop_auxiliary(variables: dict) -> dict:
  """The variables of the network that is deployed: the main domain's batch norms alone.

  Args:
    variables: of a model of any domains, {"params": ..., "batch_stats": ..., ...}.

  Returns:
    The variables of the same model with one domain. Its logits are those of the main domain,
    bit for bit.
  """
  return of_domain(variables, "")


def of_domain(variables: dict, domain: str) -> dict:
  """The variables of the ordinary network that has one domain's batch norms.

  Args:
    variables: of a model of any domains, {"params": ..., "batch_stats": ..., ...}.
    domain: which one; where it has nothing of its own, as the main one, it is what all share.

  Returns:
    The variables of the same model with one domain. Its logits are those of `domain`, bit for bit.
  """
  flat = traverse_util.flatten_dict(variables)
  main = {path: leaf for path, leaf in flat.items() if path == main_path(path)}
  own = {main_path(path): leaf for path, leaf in flat.items()
         if path[0] == "batch_stats_" + domain or path[-1] in ("scale_" + domain, "bias_" + domain)}
  return traverse_util.unflatten_dict({**main, **own})


def main_path(path: tuple[str, ...]) -> tuple[str, ...]:
  """Where the main domain has what another domain has at `path`; or path itself.

  Args:
    path: of a variable, its collection first: ("batch_stats_adversarial", "stem_norm", "mean").
  """
  collection, *modules, leaf = path
  if collection == "params":
    return (collection, *modules, re.sub(r"^(scale|bias)_.*", r"\1", leaf))
  return ("batch_stats", *modules, leaf)


def domains_of_params(params: dict, domains: Sequence[str]) -> dict:
  """A tree of names: the one domain that a parameter belongs to, "" where domains share it.

  Args:
    params: of a model.
    domains: all domains of the model; the first is the main one.
  """
  flat = traverse_util.flatten_dict(params)

  def owner(path):
    for domain in domains[1:]:
      if path[-1] in ("scale_" + domain, "bias_" + domain):
        return domain
    has_bank = any((*path[:-1], "scale_" + domain) in flat for domain in domains[1:])
    return domains[0] if has_bank else ""

  return traverse_util.unflatten_dict({path: owner(path) for path in flat})


def check_domains(domains: Sequence[str], known: Sequence[str], images: int) -> None:
  """Raises a ValueError where a pass of so many images cannot be one of these domains."""
  if not domains or len(set(domains)) != len(domains) or not set(domains) <= set(known):
    raise ValueError(f"domains={tuple(domains)}: name some of {tuple(known)}, each at most once")
  if images % len(domains):
    raise ValueError(f"{images} images are not {len(domains)} equal parts, one for each of "
                     f"{tuple(domains)}")


def _suffix(domain: str, domains: Sequence[str]) -> str:
  return "" if domain == domains[0] else "_" + domain


def _groups(axis_name: str, size: int) -> list[list[int]]:
  replicas = jax.lax.axis_size(axis_name)
  if replicas % size:
    raise ValueError(f"group_size={size} does not divide the {replicas} replicas")
  return [list(range(first, first + size)) for first in range(0, replicas, size)]


def _average(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
  return momentum * old + (1 - momentum) * new
