"""Collectives in the text of compiled programs; and that AdvProp's attack has none."""

import pytest

from advprop_jax.runtime import hlo
from tests import virtual_devices

# Two loops, one in the other, in the spelling of a TPU: the outer says how often, the inner's
# condition does. An all-gather that is started and awaited apart, one hidden in a fusion.
TEXT = """HloModule step, is_scheduled=true

%sum (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%few (state.1: (s32[], f32[4,2])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)S(1)}) parameter(0)
  %five = s32[]{:T(128)} constant(5), metadata={op_name="jit(step)"}
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %five), direction=LT, metadata={op_name="lt"}
}

%inner (state.2: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %state.2 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)S(1)}) parameter(0)
  %x.2 = f32[4,2]{1,0:T(8,128)S(1)} get-tuple-element(%state.2), index=1
  %permuted = f32[4,2]{1,0:T(8,128)S(1)} collective-permute(%x.2), source_target_pairs={{0,1},{1,0}}
  %counter.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %tuple.2 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)S(1)}) tuple(%counter.2, %permuted)
}

%outer (state.3: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %state.3 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)S(1)}) parameter(0)
  %while.3 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)S(1)}) while(%state.3), condition=%few, body=%inner
  %x.3 = f32[4,2]{1,0:T(8,128)S(1)} get-tuple-element(%while.3), index=1
  %mean = f32[4,2]{1,0:T(8,128)S(1)} all-reduce(%x.3), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %counter.3 = s32[]{:T(128)} get-tuple-element(%while.3), index=0
  ROOT %tuple.3 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)S(1)}) tuple(%counter.3, %mean)
}

%hidden (p.4: bf16[6]) -> bf16[3] {
  %p.4 = bf16[6]{0:T(8,128)(2,1)} parameter(0)
  ROOT %scattered = bf16[3]{0:T(8,128)(2,1)} reduce-scatter(%p.4), replica_groups=[2,2]<=[4], dimensions={0}, to_apply=%sum
}

ENTRY %main (p.5: f32[4,2], q.5: bf16[6]) -> (f32[4,2], bf16[3]) {
  %p.5 = f32[4,2]{1,0:T(8,128)} parameter(0)
  %q.5 = bf16[6]{0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.5 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)}) tuple(%zero, %p.5)
  %while.5 = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)}) while(%tuple.5), condition=%unknown, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %x.5 = f32[4,2]{1,0:T(8,128)} get-tuple-element(%while.5), index=1
  %gather = (f32[4,2]{1,0:T(8,128)}, f32[16,2]{1,0:T(8,128)}) all-gather-start(%x.5), replica_groups={}, dimensions={0}
  %gathered = f32[16,2]{1,0:T(8,128)} all-gather-done(%gather)
  %both = (f32[16,2]{1,0:T(8,128)}, pred[7]{0}, /*index=2*/s4[3]{0}) tuple(%gathered, %x.5)
  %fusion.5 = bf16[3]{0:T(8,128)(2,1)} fusion(%q.5), kind=kCustom, calls=%hidden
  %all = (f32[4,2]{1,0:T(8,128)}, bf16[3]{0:T(8,128)(2,1)}) all-reduce(%x.5, %fusion.5), replica_groups={}, to_apply=%sum, metadata={op_name="jit(step)/psum" stack_frame_id=9}
  ROOT %result = (f32[4,2]{1,0:T(8,128)}, bf16[3]{0:T(8,128)(2,1)}) tuple(%x.5, %fusion.5)
}
"""  # noqa: E501

PROGRAM = """
import functools, json
import jax, jax.numpy as jnp, numpy as np, optax
from advprop_jax.method import step as step_module
from advprop_jax.method.attack import Attack
from advprop_jax.method.schemes import SCHEMES
from advprop_jax.method.state import create_train_state
from advprop_jax.method.step import Method, train_step
from advprop_jax.runtime import hlo, parallel
from tests import one_block

def found(steps, statistics="running", accumulation=1):
  scheme = SCHEMES["advprop"]
  model = one_block.create(domains=scheme.domains, axis_name=parallel.AXIS, group_size=2)
  attack = Attack(num_steps=steps, statistics=statistics)
  method = Method(model, scheme, attack, optax.sgd(0.1), accumulation=accumulation)
  state = jax.eval_shape(lambda: create_train_state(model, method.optimizer, 0, 28, False))
  batch = {"image": jax.ShapeDtypeStruct((8, 4, 28, 28, 3), jnp.uint8),
           "label": jax.ShapeDtypeStruct((8, 4), jnp.int32)}
  step = parallel.pmap(functools.partial(train_step, method))
  text = step.lower(state, batch).compile().as_text()
  return [[c.kind, c.bytes, c.group, c.depth, c.times] for c in hlo.collectives(text)]

def averaged(*sizes):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(8, size)).astype(np.float32) for size in sizes]
  arrays.append(arrays[0].astype(jnp.bfloat16))
  mean = parallel.pmap(lambda _, arrays: step_module.mean_over_devices(arrays, parallel.AXIS))
  text = mean.lower(0, arrays).compile().as_text()
  means = mean(0, arrays)
  return {"met": [len(visit.instruction.operands) for visit in hlo.visits(hlo.parse(text))
                  if visit.instruction.opcode == "all-reduce"],
          "types": [str(x.dtype) for x in means],
          "error": max(float(jnp.max(jnp.abs(x - jnp.mean(jnp.asarray(one), 0))))
                       for x, one in zip(means[:-1], arrays[:-1]))}

parameters = jax.eval_shape(lambda: create_train_state(
    one_block.create(), optax.sgd(0.1), 0, 28, False)).params
print(json.dumps({
    "parameters": sum(x.size * 4 for x in jax.tree.leaves(parameters)),
    "1": found(1), "10": found(10), "batch statistics": found(10, "batch"),
    "accumulated": found(10, accumulation=2),
    "averaged": averaged(5000, 12, 1, 5, 4096)}))
"""


def test_collectives_of_a_program():
  """Fails where a layout's brackets, a start and its done, a fusion or nested loops mislead."""
  found = [(c.kind, c.bytes, c.group, c.depth, c.times) for c in hlo.collectives(TEXT)]
  assert found == [
    ("collective-permute", 32, None, 2, 15), ("all-reduce", 32, 2, 1, 3),
    ("all-gather", 32, None, 0, 1), ("reduce-scatter", 12, 2, 0, 1),
    ("all-reduce", 38, None, 0, 1)]
  assert [c.source for c in hlo.collectives(TEXT)][-2:] == ["", "jit(step)/psum"]


def test_totals():
  totals = hlo.totals(hlo.collectives(TEXT))
  assert totals["all-reduce"] == {"outside": 1, "outside_bytes": 38, "in_loops": 1,
                                  "in_loops_bytes": 32}
  assert list(totals) == ["collective-permute", "all-reduce", "all-gather", "reduce-scatter"]


def test_a_loop_that_does_not_say_how_often():
  text = TEXT.replace("constant(5)", "parameter(1)")
  assert [c.times for c in hlo.collectives(text)][:2] == [None, 3]


def test_bytes_and_shapes_of_types():
  assert hlo.num_bytes("(f32[16,2]{1,0:T(8,128)}, pred[7]{0}, /*index=2*/s4[4]{0})") == 128 + 7 + 2
  assert hlo.num_bytes("(token[], f8e4m3fn[3]{0}, c64[<=2,2]{1,0}, f32[])") == 3 + 32 + 4
  assert hlo.shape("bf16[1,28,3]{2,1,0:T(8,128)(2,1)}") == (1, 28, 3)


def test_what_is_no_program():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.collectives("a traceback")


@pytest.fixture(scope="module")
def compiled():
  """Collectives of AdvProp steps for eight devices; virtual ones, so in a process of its own."""
  return virtual_devices.run(PROGRAM, 8)


def test_the_attack_has_no_collective(compiled):
  """However many steps it makes: the same collectives, none in a loop, whatever else there is."""
  assert compiled["10"] == compiled["1"]
  assert all(depth == 0 for *_, depth, _ in compiled["10"])


def test_gradients_are_averaged_once_by_all_devices(compiled):
  """Statistics of groups of two besides; gradients alone are among all, with a few numbers more."""
  assert {group for _, _, group, _, _ in compiled["10"]} == {2, 8}
  of_all = [bytes_ for _, bytes_, group, _, _ in compiled["10"] if group == 8]
  assert len(of_all) <= 2
  assert compiled["parameters"] < sum(of_all) < 1.4 * compiled["parameters"]


def test_an_attack_by_statistics_of_groups_has_collectives_in_its_loop(compiled):
  """So the test above would see them."""
  looped = [(group, times) for _, _, group, depth, times in compiled["batch statistics"] if depth]
  assert looped
  assert set(looped) == {(2, 10)}


def test_gradients_of_micro_batches_are_averaged_once(compiled):
  """Statistics of groups are of each micro-batch; the gradient's mean is outside of their loop."""
  assert {(group, depth, times) for _, _, group, depth, times in compiled["accumulated"]} == {
    (2, 1, 2), (8, 0, 1)}


def test_small_arrays_are_averaged_as_one(compiled):
  """Fault: devices of a CPU that meet for each array of hundreds; other means, or other types."""
  assert sum(compiled["averaged"]["met"]) == 3   # one of all small ones, and the two large ones
  assert compiled["averaged"]["types"] == ["float32"] * 5 + ["bfloat16"]
  assert compiled["averaged"]["error"] < 1e-6
