"""The bank of batch norms: whose statistics, whose scale and bias, and who may change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advprop_jax.models.batch_norm import (
  BatchNorm,
  drop_auxiliary,
  of_domain,
  statistics_collection,
)
from tests import one_block

DOMAINS = ("clean", "adversarial")
BOTH = ["batch_stats", "batch_stats_adversarial"]


def make_images(n=8, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(scale * rng.normal(0.5, 1.0, (n, 4, 5, 3)), jnp.float32)


def make_bank(**settings):
  """A bank and variables away from the symmetric start."""
  bank = BatchNorm(domains=DOMAINS, **settings)
  variables = bank.init(jax.random.key(0), make_images(), domains=DOMAINS, train=False)
  rng = np.random.default_rng(1)
  return bank, jax.tree.map(
      lambda x: x + jnp.asarray(rng.uniform(0.1, 0.5, x.shape), x.dtype), variables)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def test_result_and_new_statistics_are_those_of_the_formula():
  """Fault: the unbiased variance (PyTorch's) in the running statistics."""
  bank, variables = make_bank(momentum=0.9)
  images = make_images()
  y, new = bank.apply(variables, images, domains=("adversarial",), train=True, mutable=BOTH)

  x = np.asarray(images, np.float64)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  scale, bias = (np.asarray(variables["params"][f"{leaf}_adversarial"])
                 for leaf in ("scale", "bias"))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3) * scale + bias, atol=1e-5)
  old = variables["batch_stats_adversarial"]
  assert_close(new["batch_stats_adversarial"],
               {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var})
  assert_same(new["batch_stats"], variables["batch_stats"])


def test_running_statistics_are_read_when_not_training():
  bank, variables = make_bank()
  y = bank.apply(variables, make_images(), domains=("clean",), train=False)
  stats, params = variables["batch_stats"], variables["params"]
  expected = ((make_images() - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * params["scale"]
              + params["bias"])
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(("domains", "mutable", "changed"), [
    (("clean",), BOTH, {"batch_stats"}),
    (("adversarial",), BOTH, {"batch_stats_adversarial"}),
    (("adversarial",), ["batch_stats"], set()),
    (DOMAINS, ["batch_stats_adversarial"], {"batch_stats_adversarial"}),
    (DOMAINS, BOTH, set(BOTH)),
])
def test_only_what_mutable_names_and_the_pass_uses_changes(domains, mutable, changed):
  """Fault: a pass through one batch norm moves the statistics of another."""
  bank, variables = make_bank()
  _, new = bank.apply(variables, make_images(), domains=domains, train=True, mutable=mutable)
  for name in mutable:
    same = all(bool(jnp.all(new[name][leaf] == variables[name][leaf])) for leaf in ("mean", "var"))
    assert same == (name not in changed)


def test_a_pass_that_names_nothing_leaves_no_trace():
  bank, variables = make_bank()
  y = bank.apply(variables, make_images(), domains=DOMAINS, train=True)
  assert isinstance(y, jax.Array)  # and not a pair with updates


def test_statistics_do_not_move_unless_training():
  bank, variables = make_bank()
  _, new = bank.apply(variables, make_images(), domains=DOMAINS, train=False, mutable=BOTH)
  assert_same(new, {name: variables[name] for name in BOTH})


def test_shared_statistics_are_those_of_one_batch_and_leave_the_affine_part_alone():
  bank, variables = make_bank(share_statistics=True)
  assert set(variables) == {"params", "batch_stats"}
  assert set(variables["params"]) == {"scale", "bias", "scale_adversarial", "bias_adversarial"}
  images = jnp.concatenate([make_images(), make_images(seed=1, scale=5.0)])
  _, new = bank.apply(variables, images, domains=DOMAINS, train=True, mutable=["batch_stats"])
  _, joint = bank.apply(variables, images, domains=("clean",), train=True,
                        mutable=["batch_stats"])
  assert_close(new, joint)
  assert [statistics_collection(domain, DOMAINS, shared=True) for domain in DOMAINS] == [
      "batch_stats", "batch_stats"]


def test_shared_affine_part_leaves_the_statistics_alone():
  _, variables = make_bank(share_affine=True)
  assert set(variables) == {"params", *BOTH}
  assert set(variables["params"]) == {"scale", "bias"}
  assert [statistics_collection(domain, DOMAINS) for domain in DOMAINS] == BOTH


def test_statistics_are_float32_where_the_network_is_bfloat16():
  """Fault: moments in bfloat16, whose 8 bits lose the variance beside a large mean."""
  bank, variables = make_bank(dtype=jnp.bfloat16, momentum=0.0)
  images = (make_images(64) + 4).astype(jnp.bfloat16)
  y, new = bank.apply(variables, images, domains=("clean",), train=True, mutable=BOTH)
  assert y.dtype == jnp.bfloat16
  x = np.asarray(images, np.float64)
  assert new["batch_stats"]["var"].dtype == jnp.float32
  np.testing.assert_allclose(new["batch_stats"]["var"], x.var((0, 1, 2)), rtol=1e-3)


@pytest.mark.parametrize("domains", [(), ("clean", "clean"), ("noise",)])
def test_refuses_domains_that_cannot_be(domains):
  bank, variables = make_bank()
  with pytest.raises(ValueError, match="each at most once"):
    bank.apply(variables, make_images(), domains=domains, train=False)


def test_refuses_unequal_parts():
  bank, variables = make_bank()
  with pytest.raises(ValueError, match="not 2 equal parts"):
    bank.apply(variables, make_images(7), domains=DOMAINS, train=False)


# A whole network


@pytest.fixture(scope="module")
def network():
  """(model, variables away from the start, clean images, adversarial images)."""
  model = one_block.create(domains=DOMAINS)
  rng = np.random.default_rng(0)
  clean, adversarial = (jnp.asarray(rng.uniform(-1, 1, (6, 16, 16, 3)), jnp.float32)
                        for _ in range(2))
  variables = jax.jit(model.init)(jax.random.key(0), clean)
  return model, jax.tree.map(
      lambda x: x + jnp.asarray(rng.uniform(0.0, 0.2, x.shape), x.dtype), variables), clean, (
          adversarial * 0.5 + 0.3)


def loss_of_pass(model, variables, params, images, domains):
  logits, new = model.apply({**variables, "params": params}, images, domains=domains, train=True,
                            mutable=BOTH)
  return jnp.sum(jnp.square(logits)), (logits, new)


def test_one_pass_of_two_domains_is_two_passes(network):
  """Logits, new statistics and gradients. Fault: statistics over the concatenated batch."""
  model, variables, clean, adversarial = network

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(images, domains):
    loss = functools.partial(loss_of_pass, model, variables, images=images, domains=domains)
    return jax.grad(loss, has_aux=True)(variables["params"])

  both, (logits, new) = gradient(jnp.concatenate([clean, adversarial]), DOMAINS)
  first, (clean_logits, clean_new) = gradient(clean, ("clean",))
  second, (adversarial_logits, adversarial_new) = gradient(adversarial, ("adversarial",))
  assert_close(logits, jnp.concatenate([clean_logits, adversarial_logits]), atol=1e-5)
  assert_close(new["batch_stats"], clean_new["batch_stats"])
  assert_close(new["batch_stats_adversarial"], adversarial_new["batch_stats_adversarial"])
  assert_close(both, jax.tree.map(jnp.add, first, second), rtol=1e-3, atol=1e-3)


def test_without_auxiliary_batch_norms_the_logits_are_bit_identical(network):
  model, variables, clean, _ = network
  deployed = one_block.create(domains=("clean",))
  main = drop_auxiliary(variables)
  shapes = jax.eval_shape(deployed.init, jax.random.key(0), clean)
  assert jax.tree.structure(main) == jax.tree.structure(shapes)
  np.testing.assert_array_equal(jax.jit(model.apply)(variables, clean),
                                jax.jit(deployed.apply)(main, clean))


@pytest.mark.parametrize("shared", [{}, {"share_statistics": True}, {"share_affine": True}])
def test_the_ordinary_network_of_each_domain(shared):
  """Fails where it has the statistics or the affine map of another domain."""
  bank, one = BatchNorm(domains=("clean", "aux", "aux_2"), **shared), BatchNorm(domains=("clean",))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 2, 3)), jnp.float32)
  variables = bank.init(jax.random.key(0), x, bank.domains, train=True)
  leaves, structure = jax.tree.flatten(variables)
  rng = np.random.default_rng(1)
  variables = jax.tree.unflatten(structure, [rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
                                             for leaf in leaves])
  results = []
  for domain in bank.domains:
    ordinary = of_domain(variables, domain)
    assert jax.tree.structure(ordinary) == jax.tree.structure(
        one.init(jax.random.key(0), x, one.domains, train=True))
    results.append(one.apply(ordinary, x, one.domains, train=False))
    np.testing.assert_array_equal(results[-1], bank.apply(variables, x, (domain,), train=False))
  assert not np.array_equal(results[0], results[1])
  assert not np.array_equal(results[1], results[2])
