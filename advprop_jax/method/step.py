"""The train step: a pure function, per device, collectives by axis name.

    state, metrics = train_step(method, state, batch)

`Method` holds all that does not change during training, and is bound first:
`jax.pmap(functools.partial(train_step, method), axis_name=...)`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax import flatten_util

from advprop_jax.method import attack as attacks
from advprop_jax.method.attack import PIXEL, Attack
from advprop_jax.method.loss import cross_entropy, mean_over_images
from advprop_jax.method.optimizer import stop_frozen
from advprop_jax.method.schemes import Part, Scheme
from advprop_jax.method.state import TrainState, update_ema
from advprop_jax.models.batch_norm import statistics_collection
from advprop_jax.models.channels import once
from advprop_jax.models.dropout import image_keys
from advprop_jax.models.network import Network

_SMALL = 4096                          # numbers of an array; on the CPU larger ones stay apart


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train a network: all of it but the state and the data.

  Attributes:
    model: a network whose domains are those of the scheme, and that knows the pmapped axis.
    scheme: what a mini-batch becomes.
    attack: makes the adversarial parts.
    optimizer: the optax chain.
    label_smoothing: of the loss that trains.
    ema_decay: of the moving averages; unused where the state holds none.
    accumulation: number of micro-batches, one after the other, that make one update.
    trainable: which parameters have a gradient, as the optimizer knows it.
  """

  model: Network
  scheme: Scheme
  attack: Attack
  optimizer: optax.GradientTransformation
  label_smoothing: float = 0.1
  ema_decay: float = 0.9999
  accumulation: int = 1
  trainable: str = "all"

  @property
  def axis_name(self) -> str | None:
    """The pmapped axis; None outside of pmap."""
    return self.model.axis_name


def train_step(method: Method, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
  """One update from one mini-batch, per device (Algorithm 1 of the paper).

  Args:
    method: how.
    state: the same on all devices.
    batch: this device's part, {"label": (n,) integers, and for each source of the scheme's parts
      (n, h, w, 3) uint8, "image" the first of them}.

  Returns:
    The new state, and metrics {"loss", "loss/<part>", "accuracy/<part>"}, means over all images of
    all devices, and "gradient_norm", the gradient's L2 norm; both the same on all devices.
  """
  attack_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  attack = attacks.ramped(method.attack, state.step)
  batch = {"label": batch["label"],
           "key": image_keys(attack_key, len(batch["label"]), method.axis_name),
           **{part.source: to_model_units(batch[part.source]) for part in method.scheme.made}}

  def micro_step(batch_stats, micro_batch):
    batch, dropout_key = micro_batch
    parts, batch_stats, gradients, starts = make_parts(
        method, attack, state.params, batch_stats, batch, dropout_key)
    losses, logits = {}, {}
    for together in passes(method.scheme, method.model):
      # One thing after the other, or attack and passes are all in memory: 1.35 times as much.
      before = [gradients, [part["image"] for part in parts.values()]]
      own = {name: after(before, parts[name]) for name in together}
      gradient, (batch_stats, *results) = pass_gradient(
          method, state.params, batch_stats, own, dropout_key)
      gradients.append(gradient)
      losses, logits = losses | results[0], logits | results[1]
    metrics = step_metrics(method.scheme, losses, starts, logits, parts)
    return batch_stats, (functools.reduce(optax.tree.add, gradients), metrics)

  batch_stats, averages = accumulate(
      micro_step, state.batch_stats, batch, dropout_key, method.accumulation)
  batch_stats, (gradient, metrics) = mean_over_devices((batch_stats, averages), method.axis_name)
  if method.scheme.per_image:
    gradient = mean_over_images(gradient, method.scheme)
  metrics["gradient_norm"] = norm(gradient)
  return update(method, state, gradient, batch_stats), metrics


def pass_gradient(method: Method, params: dict, batch_stats: dict, parts: dict,
                  dropout_key: jax.Array) -> tuple[dict, tuple[dict, dict, dict]]:
  """What the parts of one pass add to the gradient of the summed loss.

  The gradient of a sum is the sum of gradients: taken pass by pass, what a backward pass needs of
  the forward pass is in memory for one of them at a time.

  Args:
    method: model, scheme, label smoothing.
    params: of the model.
    batch_stats: every domain's collection.
    parts: {name: {"image": (n, h, w, 3) in [-1, 1], "label": (n,), ...}}.
    dropout_key: the same for all parts.

  Returns:
    The gradient by params, the collections with those of the pass moved, {part: its loss} and
    {part: logits}.
  """
  def loss_fn(params):
    logits, moved = forward(method, params, batch_stats, parts, dropout_key)
    losses = {name: jnp.mean(cross_entropy(logits[name], part["label"], method.label_smoothing))
              for name, part in parts.items()}
    return weighted(method.scheme, losses), (moved, losses, logits)

  return jax.grad(loss_fn, has_aux=True)(params)


def after(results, part: dict) -> dict:
  """A part, with the same values, whose images are there only when the results are.

  XLA on the CPU by default drops barriers, and orders what is independent as it likes. It does not
  know that no sum of squares is -1. The sum is of one number of each result: none is there before
  the product, or the sum over images, that makes all numbers of its array. It is added
  up `once`: in one operation with the images it would be again for each pixel.

  Args:
    results: real arrays, none of them empty, in lists and dictionaries; at least one.
    part: {"image": (n, h, w, 3), ...}.
  """
  numbers = jnp.stack([x.reshape(-1)[0] for x in jax.tree.leaves(results)])
  nothing = once(jnp.sum(jnp.square(numbers)) == -1).astype(part["image"].dtype)
  return {**part, "image": part["image"] + nothing}


def weighted(scheme: Scheme, losses: dict[str, jax.Array]) -> jax.Array:
  """The sum of the losses {part: loss}, each with its part's weight."""
  return sum(scheme.coefficient(part, part.weight) * losses[part.name]
             for part in scheme.made if part.name in losses)


def make_parts(method: Method, attack: Attack, params: dict, batch_stats: dict, batch: dict,
               dropout_key: jax.Array) -> tuple[dict, dict, list, dict]:
  """The parts of a mini-batch, attacked where the scheme says so.

  Args:
    method: model and scheme.
    attack: as it is at this step.
    params: of the model.
    batch_stats: every domain's collection.
    batch: {source: (n, h, w, 3) in [-1, 1], "label": (n,), "key": (n, ...)}.
    dropout_key: the same for all parts.

  Returns:
    {part: {"image", "label", "key"}} for each part with a weight; batch_stats; and of attacks that
    train the gradients and {part: the weighted loss of its start, the loss}. An attack that does
    not train leaves no trace: batch_stats are those given, and there is no gradient.
  """
  parts, gradients, starts = {}, [], {}
  for part in method.scheme.made:
    own = {"image": batch[part.source], "label": batch["label"], "key": batch["key"]}
    own = {name: _deal(value, method.scheme.pieces, part.slots) for name, value in own.items()}
    if part.attacked and part.start_weight:
      own["image"], batch_stats, gradient, starts[part.name] = attack_and_train(
          method, attack, params, batch_stats, part, own, dropout_key)
      gradients.append(gradient)
    elif part.attacked:
      own["image"] = attack_images(method.model, {"params": params, **batch_stats}, part.domain,
                                   attack, own["image"], own["label"], own["key"], dropout_key)
    parts[part.name] = own
  return parts, batch_stats, gradients, starts


def attack_images(model: Network, variables: dict, domain: str, attack: Attack,
                  images: jax.Array, labels: jax.Array, keys: jax.Array,
                  dropout_key: jax.Array | None = None) -> jax.Array:
  """Adversarial images against the network with the batch norms of `domain`.

  Args:
    model: the network to be attacked.
    variables: its variables; read, never written.
    domain: whose batch norms.
    attack: the attacker's settings.
    images: (n, h, w, 3), in [-1, 1].
    labels: (n,), the true ones.
    keys: (n, ...), a random key for each image.
    dropout_key: used only where attack.dropout is set.

  Returns:
    (n, h, w, 3), in [-1, 1].
  """
  def logits_of(images):
    return model.apply(variables, images, domains=(domain,), train=attack.statistics == "batch",
                       rngs={"dropout": dropout_key} if attack.dropout else {})

  targets, sign = labels, 1
  if attack.target == "random":
    target_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    targets, sign = attacks.random_targets(labels, target_keys, model.num_classes), -1
  elif attack.target == "least_likely":
    targets, sign = attacks.least_likely_targets(logits_of(images), labels), -1

  def loss(images):
    return sign * jnp.sum(cross_entropy(logits_of(images), targets, attack.label_smoothing))

  return attacks.generate(loss, images, keys, attack)


def attack_and_train(method: Method, attack: Attack, params: dict, batch_stats: dict, part: Part,
                     batch: dict, dropout_key: jax.Array) -> tuple[jax.Array, dict, dict, tuple]:
  """One attack step whose pass trains too: one gradient, of the images and of the parameters.

  Args:
    method: model, scheme, label smoothing.
    attack: for start, size of the step and ball; the pass itself is one of training.
    params: of the model.
    batch_stats: every domain's collection.
    part: which one; its start_weight is the weight of this loss.
    batch: {"image": (n, h, w, 3) in [-1, 1], "label": (n,), "key": (n, ...)}.
    dropout_key: for dropout and stochastic depth.

  Returns:
    Adversarial images, the collections with those of the part's domain moved, the gradient, and
    the loss of the start, as weighted and as it is.

  *Source:* Mei et al., "Fast AdvProp", ICLR 2022; meijieru/fast_advprop, imagenet.py, train.
  """
  def loss_fn(params, images):
    parts = {part.name: {**batch, "image": images}}
    logits, moved = forward(method, params, batch_stats, parts, dropout_key)
    loss = jnp.mean(cross_entropy(logits[part.name], batch["label"], method.label_smoothing))
    weighted = method.scheme.coefficient(part, part.start_weight) * loss
    return weighted, (moved, (weighted, loss))

  start = attacks.start(batch["image"], batch["key"], attack)
  (gradient, ascent), (moved, losses) = jax.grad(loss_fn, (0, 1), has_aux=True)(params, start)
  return attacks.ascend(start, ascent, batch["image"], attack), moved, gradient, losses


def forward(method: Method, params: dict, batch_stats: dict, parts: dict,
            dropout_key: jax.Array) -> tuple[dict, dict]:
  """Logits of the parts of one pass through the network, and the new running statistics.

  Args:
    method: model and scheme.
    params: of the model.
    batch_stats: every domain's collection.
    parts: {name: {"image": (n, h, w, 3) in [-1, 1], ...}}, one entry of `passes`.
    dropout_key: the same for all parts.

  Returns:
    {part: (n, classes)} and the collections, those of the parts' domains moved.
  """
  model, together = method.model, [part for part in method.scheme.made if part.name in parts]
  domains = tuple(dict.fromkeys(part.domain for part in together))
  names = [[part.name for part in together if part.domain == domain] for domain in domains]
  # Parts of one domain alternate, so that an image's place does not depend on the devices.
  images = jnp.concatenate([jnp.stack([parts[name]["image"] for name in of_domain], 1)
                            for of_domain in names])
  outputs, moved = model.apply(
      {"params": stop_frozen(params, method.trainable), **batch_stats},
      images.reshape(-1, *images.shape[2:]), domains=domains, train=True,
      mutable=[statistics_collection(domain, model.domains, model.share_statistics)
               for domain in domains], rngs={"dropout": dropout_key})
  outputs = outputs.reshape(len(domains), -1, images.shape[1], outputs.shape[-1])
  logits = {name: outputs[d, :, k]
            for d, of_domain in enumerate(names) for k, name in enumerate(of_domain)}
  return logits, {**batch_stats, **moved}


def passes(scheme: Scheme, model: Network) -> list[list[str]]:
  """Names of the parts that go through the network together: those normalised as one batch.

  With a batch norm for each domain, that is one pass for each domain: as fast as one of all
  (measured: tests/benchmarks/README.md), and in less memory.
  """
  together = {}
  for domain in scheme.domains:
    collection = statistics_collection(domain, model.domains, model.share_statistics)
    of_domain = [part.name for part in scheme.made if part.domain == domain]
    if of_domain:
      together.setdefault(collection, []).extend(of_domain)
  return list(together.values())


def accumulate(micro_step, batch_stats: dict, batch: dict, dropout_key: jax.Array, number: int):
  """Runs micro_step over so many micro-batches, and averages what it gives beside the statistics.

  Only one is in memory at a time. With one there is no loop.
  """
  if number == 1:
    return micro_step(batch_stats, (batch, dropout_key))
  batch = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), batch)
  inputs = (batch, jax.random.split(dropout_key, number))
  batch_stats, results = jax.lax.scan(micro_step, batch_stats, inputs)
  return batch_stats, jax.tree.map(lambda x: jnp.mean(x, axis=0), results)


def update(method: Method, state: TrainState, gradients: dict, batch_stats: dict) -> TrainState:
  """The state after one optimizer step."""
  updates, opt_state = method.optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = update_ema(state.ema, {"params": params, **batch_stats}, state.step, method.ema_decay)
  return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, ema=ema,
                       opt_state=opt_state)


def step_metrics(scheme: Scheme, losses: dict, starts: dict, logits: dict, parts: dict) -> dict:
  """Scalars of one step, in the training's own terms; the loss is that of all parts and starts."""
  accuracy = {
      f"accuracy/{name}": jnp.mean(jnp.argmax(logits[name], axis=-1) == parts[name]["label"])
      for name in parts}
  return {"loss": weighted(scheme, losses) + sum(part for part, _ in starts.values()),
          **{f"loss/{name}": losses[name] for name in losses},
          **{f"loss/{name}_start": loss for name, (_, loss) in starts.items()}, **accuracy}


def norm(tree: dict) -> jax.Array:
  """The L2 norm of all numbers of all arrays, of one floating type: a scalar.

  On the CPU small arrays, most of a network's, are put into one: XLA makes three operations of each
  sum, and compiles them for each shape.
  """
  def of_few(tree):
    arrays = [x.reshape(-1) for x in jax.tree.leaves(tree)]
    small = [x for x in arrays if x.size <= _SMALL]
    large = [x for x in arrays if x.size > _SMALL]
    return optax.tree.norm([once(jnp.concatenate(small)) if small else [], *large])

  return jax.lax.platform_dependent(tree, cpu=of_few, default=optax.tree.norm)


def mean_over_devices(tree, axis_name: str | None):
  """The mean over all devices, of every leaf; all are of floating types.

  On the CPU small arrays, most of a network's, are put into one: devices meet for each array of an
  all-reduce, and for the hundreds of a step one after the other (measured:
  tests/benchmarks/README.md).
  """
  if axis_name is None:
    return tree
  mean = functools.partial(jax.lax.pmean, axis_name=axis_name)
  if jax.lax.axis_size(axis_name) == 1:  # there is nobody to meet
    return mean(tree)

  def of_few(tree):
    leaves, structure = jax.tree.flatten(tree)
    small = {i: x for i, x in enumerate(leaves) if x.size <= _SMALL}
    row, as_they_were = flatten_util.ravel_pytree(small)
    row, large = mean((row, {i: x for i, x in enumerate(leaves) if i not in small}))
    means = as_they_were(row) | large
    return jax.tree.unflatten(structure, [means[i] for i in range(len(leaves))])

  return jax.lax.platform_dependent(tree, cpu=of_few, default=mean)


def to_model_units(images: jax.Array) -> jax.Array:
  """uint8 images, 0-255, as float32 in [-1, 1]."""
  return images.astype(jnp.float32) * PIXEL - 1


def _deal(x, pieces, slots):
  """The slots of every `pieces` rows of x."""
  dealt = x.reshape(-1, pieces, *x.shape[1:])[:, slice(*slots)]
  return dealt.reshape(-1, *x.shape[1:])
