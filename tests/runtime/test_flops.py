"""FLOPs of compiled programs, against XLA's own count and against loops that are written out."""

import functools

import jax
import jax.numpy as jnp
import pytest

from advprop_jax.runtime import flops

CONVOLUTIONS = {
  "valid": {"window_strides": (1, 1), "padding": "VALID"},
  "same, strided": {"window_strides": (2, 2), "padding": "SAME"},
  "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
  "transposed": {"window_strides": (1, 1), "padding": ((2, 1), (0, 3)), "lhs_dilation": (2, 3)},
  "grouped": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}
IMAGES, KERNEL = (2, 9, 12, 4), (3, 3, 4, 6)


def convolve(images, kernel, **settings):
  if "feature_group_count" in settings:
    kernel = kernel[:, :, :2]
  return jax.lax.conv_general_dilated(images, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                      **settings)


def compiled(function, *shapes):
  return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_as_xla_counts_them(name):
  """Fails where strides, padding, dilation or groups are counted otherwise."""
  program = compiled(functools.partial(convolve, **CONVOLUTIONS[name]), IMAGES, KERNEL)
  counted = flops.count(program.as_text())
  assert counted.once == counted.total == program.cost_analysis()["flops"]


TPU = """HloModule step

ENTRY %main (x: bf16[7,16,6,3], w: bf16[3,3,3,8]) -> f32[2,10] {
  %x = bf16[28,16,28,3]{1,3,2,0:T(4,128)(2,1)} parameter(0)
  %w = bf16[3,3,3,8]{3,2,1,0:T(4,128)(2,1)} parameter(1)
  %a = f32[2,16]{1,0:T(2,128)} parameter(2)
  %b = f32[16,10]{1,0:T(8,128)} parameter(3)
  %stem = f32[7,16,7,8]{1,3,2,0:T(8,128)} convolution(%x, %w), window={size=3x3 stride=4x4}, dim_labels=0b1f_01io->0b1f
  %z = bf16[2,7,7,16]{3,2,1,0} parameter(4)
  %d = f32[2,7,7,16]{3,2,1,0} parameter(5)
  %depthwise = f32[3,3,1,16]{3,2,1,0} convolution(%z, %d), window={size=7x7 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf, batch_group_count=16
  ROOT %logits = f32[2,10]{1,0:T(2,128)} convolution(%a, %b), dim_labels=bf_io->bf
}
"""  # noqa: E501


def test_convolutions_as_a_tpu_has_them():
  """Spatial axes anywhere, products of matrices without a window, gradients of depthwise kernels.

  Of the 49 x 9 pairs of places in a 7 x 7 image and a 3 x 3 kernel, with a border of one, 19 x 19
  are inside.
  """
  stem, depthwise, logits = 16 * 7 * 7 * 9 * 3 * 8, 19 * 19 * 16 * 2, 2 * 16 * 10
  assert flops.count(TPU).total == 2 * (stem + depthwise + logits)


def attack(images, kernel, steps, loop):
  """Gradient ascent, as the attack is: a loop of a pass and its gradient."""
  gradient = jax.grad(lambda x: jnp.sum(jnp.square(convolve(
      x, kernel, window_strides=(2, 2), padding="SAME"))))
  return loop(0, steps, lambda _, x: x + gradient(x), images)


def written_out(start, end, body, value):
  for i in range(start, end):
    value = body(i, value)
  return value


def test_a_loop_counts_as_often_as_it_runs():
  """As many as where the loop is written out; XLA's own number has its body once."""
  looped = compiled(functools.partial(attack, steps=7, loop=jax.lax.fori_loop), IMAGES, KERNEL)
  flat = compiled(functools.partial(attack, steps=7, loop=written_out), IMAGES, KERNEL)
  counted, expected = flops.count(looped.as_text()), flops.count(flat.as_text())
  assert counted.total == expected.total == expected.once
  assert counted.correction == 7
  corrected = looped.cost_analysis()["flops"] * counted.correction
  assert corrected == pytest.approx(flat.cost_analysis()["flops"], rel=0.01)


def test_loops_in_loops():
  """The attack's inside of the accumulation's."""
  def accumulated(images, kernel):
    return jax.lax.scan(lambda total, x: (total + attack(x, kernel, 3, jax.lax.fori_loop), None),
                        images[0], images)[0]

  counted = flops.count(compiled(accumulated, (5, *IMAGES), KERNEL).as_text())
  assert (counted.correction, counted.unknown_loops) == (15, False)


def test_a_loop_that_does_not_say_how_often():
  def until_large(images, kernel):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + attack(
        x, kernel, 1, written_out), images)

  counted = flops.count(compiled(until_large, IMAGES, KERNEL).as_text())
  assert counted.unknown_loops
  assert counted.total == counted.once > 0
