"""The train step and the evaluation step: pure functions, per device, collectives by axis name.

    state, metrics = train_step(method, state, batch)

`Method` holds all that does not change during training, and is bound first:
`jax.pmap(functools.partial(train_step, method), axis_name=...)`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from advprop_jax.method.attack import ATTACKS, PIXEL, Attack, random_targets
from advprop_jax.method.loss import cross_entropy
from advprop_jax.method.schemes import Part, Scheme
from advprop_jax.method.state import TrainState, update_ema
from advprop_jax.models.batch_norm import statistics_collection
from advprop_jax.models.dropout import image_keys


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train a network: all of it but the state and the data.

  Attributes:
    model: a network whose domains are those of the scheme, and that knows the pmapped axis.
    scheme: what a mini-batch becomes.
    attack: makes the adversarial parts.
    optimizer: the optax chain.
    label_smoothing: of the loss, in training and in the attack.
    ema_decay: of the moving averages; unused where the state holds none.
    accumulation: number of micro-batches, one after the other, that make one update.
  """

  model: nn.Module
  scheme: Scheme
  attack: Attack
  optimizer: optax.GradientTransformation
  label_smoothing: float = 0.1
  ema_decay: float = 0.9999
  accumulation: int = 1

  @property
  def axis_name(self) -> str | None:
    """The pmapped axis; None outside of pmap."""
    return self.model.axis_name


def train_step(method: Method, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
  """One update from one mini-batch, per device (Algorithm 1 of the paper).

  Args:
    method: how.
    state: the same on all devices.
    batch: this device's part, {"image": (n, h, w, 3) uint8, "label": (n,) integers}.

  Returns:
    The new state, and metrics {"loss", "loss/<part>", "accuracy/<part>"}, means over all images of
    all devices, and "gradient_norm", the gradient's L2 norm; both the same on all devices.
  """
  attack_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  batch = {"label": batch["label"],
           "key": image_keys(attack_key, len(batch["label"]), method.axis_name),
           **{part.source: to_model_units(batch[part.source]) for part in method.scheme.parts}}

  def micro_step(batch_stats, micro_batch):
    batch, dropout_key = micro_batch
    images = make_parts(method, {"params": state.params, **batch_stats}, batch, dropout_key)

    def loss_fn(params):
      logits, new_stats = forward(method, params, batch_stats, images, dropout_key)
      losses = {name: jnp.mean(cross_entropy(logits[name], batch["label"], method.label_smoothing))
                for name in logits}
      loss = sum(part.weight * losses[part.name] for part in method.scheme.parts)
      return loss, (new_stats, step_metrics(loss, losses, logits, batch["label"]))

    gradients, (new_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    return new_stats, (gradients, metrics)

  batch_stats, averages = accumulate(
      micro_step, state.batch_stats, batch, dropout_key, method.accumulation)
  batch_stats, (gradients, metrics) = mean_over_devices((batch_stats, averages), method.axis_name)
  metrics["gradient_norm"] = optax.tree.norm(gradients)
  return update(method, state, gradients, batch_stats), metrics


def make_parts(method: Method, variables: dict, batch: dict, dropout_key: jax.Array) -> dict:
  """The images of every part, {name: (n, h, w, 3) in [-1, 1]}; the attack leaves no other trace."""
  images = {}
  for part in method.scheme.parts:
    images[part.name] = batch[part.source]
    if part.attacked:
      images[part.name] = attack_images(
          method.model, variables, part.domain, method.attack, images[part.name], batch["label"],
          batch["key"], method.label_smoothing, dropout_key)
  return images


def attack_images(model: nn.Module, variables: dict, domain: str, attack: Attack,
                  images: jax.Array, labels: jax.Array, keys: jax.Array,
                  label_smoothing: float = 0.0, dropout_key: jax.Array | None = None) -> jax.Array:
  """Adversarial images against the network with the batch norms of `domain`.

  Args:
    model: the network to be attacked.
    variables: its variables; read, never written.
    domain: whose batch norms.
    attack: the attacker's settings.
    images: (n, h, w, 3), in [-1, 1].
    labels: (n,), the true ones.
    keys: (n, ...), a random key for each image.
    label_smoothing: of the attacked loss.
    dropout_key: used only where attack.dropout is set.

  Returns:
    (n, h, w, 3), in [-1, 1].
  """
  rngs = {"dropout": dropout_key} if attack.dropout else {}
  targets, sign = labels, 1
  if attack.target == "random":
    target_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    targets, sign = random_targets(labels, target_keys, model.num_classes), -1

  def loss(images):
    logits = model.apply(variables, images, domains=(domain,),
                         train=attack.statistics == "batch", rngs=rngs)
    return sign * jnp.sum(cross_entropy(logits, targets, label_smoothing))

  return ATTACKS[attack.name](loss, images, keys, attack)


def forward(method: Method, params: dict, batch_stats: dict, images: dict,
            dropout_key: jax.Array) -> tuple[dict, dict]:
  """Logits of every part and the new running statistics of every domain.

  Args:
    method: model and scheme.
    params: of the model.
    batch_stats: every domain's collection.
    images: {part: (n, h, w, 3) in [-1, 1]}.
    dropout_key: the same for all parts.

  Returns:
    {part: (n, classes)} and the collections, those of the scheme's domains moved.
  """
  logits = {}
  for collection, parts in passes(method.scheme, method.model).items():
    outputs, moved = method.model.apply(
        {"params": params, **batch_stats}, jnp.concatenate([images[part.name] for part in parts]),
        domains=tuple(dict.fromkeys(part.domain for part in parts)), train=True,
        mutable=[collection], rngs={"dropout": dropout_key})
    batch_stats = {**batch_stats, **moved}
    logits |= zip((part.name for part in parts), jnp.split(outputs, len(parts)), strict=True)
  return logits, batch_stats


def passes(scheme: Scheme, model: nn.Module) -> dict[str, list[Part]]:
  """Which parts go through the network together: those that are normalised as one batch.

  Returns:
    {collection of running statistics: the parts that it is moved by}. With a batch norm for each
    domain, that is one pass for each domain: as fast as one of all (measured:
    tests/benchmarks/step.py), and in less memory.
  """
  together = {}
  for part in scheme.parts:
    collection = statistics_collection(part.domain, model.domains, model.share_statistics)
    together.setdefault(collection, []).append(part)
  return together


def accumulate(micro_step, batch_stats: dict, batch: dict, dropout_key: jax.Array, pieces: int):
  """Runs micro_step over the pieces of the batch, and averages what it gives beside the statistics.

  Only one piece is in memory at a time. With one piece there is no loop: on the CPU the body of a
  loop runs slower than the same code outside.
  """
  if pieces == 1:
    return micro_step(batch_stats, (batch, dropout_key))
  batch = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)
  inputs = (batch, jax.random.split(dropout_key, pieces))
  batch_stats, results = jax.lax.scan(micro_step, batch_stats, inputs)
  return batch_stats, jax.tree.map(lambda x: jnp.mean(x, axis=0), results)


def update(method: Method, state: TrainState, gradients: dict, batch_stats: dict) -> TrainState:
  """The state after one optimizer step."""
  updates, opt_state = method.optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = update_ema(state.ema, {"params": params, **batch_stats}, state.step, method.ema_decay)
  return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, ema=ema,
                       opt_state=opt_state)


def eval_step(method: Method, variables: dict, batch: dict, *, domain: str,
              attack: Attack | None = None) -> dict:
  """Sums over the images of one batch, of all devices.

  Args:
    method: model and axis.
    variables: of the model.
    batch: this device's part: {"image": (n, h, w, 3) uint8, "label": (n,), "mask": (n,), 0 for
      padding, "index": (n,), the place of each image in the data set}.
    domain: whose batch norms classify, and are attacked.
    attack: None for the images as they are. Its random draws depend on the index alone.

  Returns:
    {"count", "correct", "loss"}: float32 sums; the loss is without label smoothing, in nats.
  """
  images, labels, mask = to_model_units(batch["image"]), batch["label"], batch["mask"]
  if attack is not None:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(0), batch["index"])
    images = attack_images(method.model, variables, domain, attack, images, labels, keys)
  logits = method.model.apply(variables, images, domains=(domain,))
  correct = jnp.argmax(logits, axis=-1) == labels
  sums = {"count": jnp.sum(mask), "correct": jnp.sum(mask * correct),
          "loss": jnp.sum(mask * cross_entropy(logits, labels))}
  return sums if method.axis_name is None else jax.lax.psum(sums, method.axis_name)


def step_metrics(loss: jax.Array, losses: dict, logits: dict, labels: jax.Array) -> dict:
  """Scalars of one step, in the training's own terms."""
  accuracy = {f"accuracy/{name}": jnp.mean(jnp.argmax(logits[name], axis=-1) == labels)
              for name in logits}
  return {"loss": loss, **{f"loss/{name}": losses[name] for name in losses}, **accuracy}


def mean_over_devices(tree, axis_name: str | None):
  """The mean over all devices, of every leaf."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def to_model_units(images: jax.Array) -> jax.Array:
  """uint8 images, 0-255, as float32 in [-1, 1]."""
  return images.astype(jnp.float32) * PIXEL - 1
