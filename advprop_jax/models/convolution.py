"""Dense, pointwise and depthwise convolution, fast on each platform.

All pad as TensorFlow's 'SAME' does (an odd total puts the larger half at the end), a dense one, if
asked, symmetrically as PyTorch's networks do. All hold a float32 `kernel` of shape (height, width,
inputs / groups, outputs), from a normal distribution with standard deviation sqrt(2 / fan_out).

Depthwise convolution has two forms. TPUs and GPUs take XLA's grouped convolution. On the CPU that
one is 6 to 100 times slower than a sum of shifted copies of the image, each times its row of the
kernel, which XLA turns into one vectorised loop. `jax.lax.platform_dependent` chooses when the
program is compiled *for* a platform, so a program for a TPU that is compiled on a CPU host has the
TPU's form.

Dense convolution has two forms of its gradients. On the CPU XLA has one fast routine, for channels
last in images and kernels. The compiled program moves the axes of a gradient to suit it, but only
outside of loops: in the loop of an attack JAX's own gradients of a small ResNet took 8 to 10 times
as long (jax 0.10.2). The CPU's form moves the axes itself.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# On the CPU: how many pieces of images are added up elementwise for the weight gradient, and from
# how many values on one image is as many pieces.
_PIECES = 16
LARGE = 50_000
FEW = 4                                # up to so many channels, those of an image


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Normal with standard deviation sqrt(2 / fan_out), fan_out = height * width * outputs.

  Args:
    key: a random key.
    shape: of a dense kernel, (height, width, inputs, outputs).
    dtype: type of the result.

  *Source:* tensorflow/tpu, models/official/efficientnet/efficientnet_model.py,
  conv_kernel_initializer.
  """
  return _normal(key, shape, shape[0] * shape[1] * shape[3], dtype)


def depthwise_kernel_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """As `kernel_init`, for a depthwise kernel (height, width, 1, channels).

  Each channel has one output: fan_out = height * width. In the source a depthwise kernel is
  (height, width, channels, 1), and its last axis is what counts as the outputs.
  """
  return _normal(key, shape, shape[0] * shape[1], dtype)


def _normal(key, shape, fan_out, dtype):
  return math.sqrt(2.0 / fan_out) * jax.random.normal(key, shape, dtype)


class Convolution(nn.Module):
  """A dense convolution without bias: (n, h, w, c) -> (n, ceil(h / stride), ..., features).

  Attributes:
    features: channels of the result.
    kernel_size: side of the kernel.
    stride: step between windows, along both axes.
    dtype: type of the computation and of the result.
    symmetric: pads kernel_size // 2 pixels on each side, for an odd kernel_size; else as 'SAME'
      does. The two differ where the stride is not 1.
  """

  features: int
  kernel_size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  symmetric: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", kernel_init, shape, jnp.float32)
    return dense(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.symmetric)


class Pointwise(nn.Module):
  """A 1 x 1 convolution, as the matrix product that it is: (..., c) -> (..., features).

  Attributes:
    features: channels of the result.
    use_bias: adds a bias that starts at zero.
    dtype: type of the computation and of the result.
  """

  features: int
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", kernel_init, (1, 1, x.shape[-1], self.features), jnp.float32)
    # Two axes: the weight gradient of more than two copies its input, transposed, on the CPU.
    flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
    y = (flat @ kernel[0, 0].astype(self.dtype)).reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      y += bias.astype(self.dtype)
    return y


class Depthwise(nn.Module):
  """A depthwise convolution without bias: (n, h, w, c) -> (n, ceil(h / stride), ..., c).

  Attributes:
    kernel_size: side of the kernel.
    stride: step between windows, along both axes.
    dtype: type of the computation and of the result.
  """

  kernel_size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
    kernel = self.param("kernel", depthwise_kernel_init, shape, jnp.float32)
    return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: jax.Array, kernel: jax.Array, stride: int = 1, symmetric: bool = False) -> jax.Array:
  """Dense convolution, with gradients in the form that is fast on the platform compiled for.

  Reverse-mode derivatives only, as `depthwise`.

  Args:
    x: (n, h, w, c).
    kernel: (k, k, c, features), of x's type.
    stride: along both axes.
    symmetric: pads k // 2 pixels on each side, for an odd k; else as 'SAME' does.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), features), of x's type.
  """
  return _convolve(x, kernel, _dense_padding(x.shape, len(kernel), stride, symmetric),
                   window_strides=(stride, stride))


def _dense_forward(x, kernel, stride, symmetric):
  return dense(x, kernel, stride, symmetric), (x, kernel)


def _dense_backward(stride, symmetric, inputs, gradient):
  def native(x, kernel, gradient):
    padding = _dense_padding(x.shape, len(kernel), stride, symmetric)
    convolve = functools.partial(_convolve, padding=padding, window_strides=(stride, stride))
    return jax.vjp(convolve, x, kernel)[1](gradient)

  def channels_last(x, kernel, gradient):
    size, before = len(kernel), _dense_padding(x.shape, len(kernel), stride, symmetric)
    # Along each axis: the length of the image, and of the gradient spread to the image's steps.
    lengths = [(length, (count - 1) * stride + 1)
               for length, count in zip(x.shape[1:3], gradient.shape[1:3], strict=True)]
    to_image = [(size - 1 - first, length - spread + first)
                for (first, _), (length, spread) in zip(before, lengths, strict=True)]
    to_kernel = [(first, size - 1 - length + spread - first)
                 for (first, _), (length, spread) in zip(before, lengths, strict=True)]
    of_kernel = _convolve(x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), to_kernel,
                          rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)
    if x.shape[3] <= FEW:
      of_x = _few_channels_gradient(_wide(gradient), _wide(kernel), stride, x.shape, before)
      of_x = of_x.astype(x.dtype)
    else:
      turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
      of_x = _convolve(gradient, turned, to_image, lhs_dilation=(stride, stride))
    return of_x, of_kernel

  return jax.lax.platform_dependent(*inputs, gradient, cpu=channels_last, default=native)


dense.defvjp(_dense_forward, _dense_backward)


def _few_channels_gradient(gradient, kernel, stride, shape, padding):
  """Input gradient of a dense convolution of few channels: one product, and a sum over shifts.

  XLA's fast routine on the CPU does not take results of so few channels: 1.3 to 2 times as long.
  """
  taps, margins = _phases(kernel, stride, padding)
  height, width = gradient.shape[1:3]
  matrix = jnp.moveaxis(taps, -1, 0).reshape(kernel.shape[3], -1)
  products = (gradient.reshape(-1, gradient.shape[3]) @ matrix).reshape(
      *gradient.shape[:3], *taps.shape[:-1])
  products = jnp.pad(products, ((0, 0), *margins, *[(0, 0)] * 5))
  phases = sum(_window(products[:, :, :, i, j], i, j, height, width, 1)
               for i in range(len(taps)) for j in range(taps.shape[1]))
  return _of_phases(phases.swapaxes(2, 3), shape)


def _convolve(x, kernel, padding, window_strides=(1, 1), **dilation):
  return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **dilation,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _dense_padding(shape, size, stride, symmetric):
  if symmetric:
    return [(size // 2, size // 2)] * 2
  return [_padding(length, size, stride) for length in shape[1:3]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Depthwise convolution, 'SAME', in the form that is fast on the platform compiled for.

  Reverse-mode derivatives only (`jax.grad`, `jax.vjp`, nested or not; not `jax.jvp`).

  Args:
    x: (n, h, w, c).
    kernel: (k, k, 1, c), of x's type.
    stride: along both axes.

  Returns:
    (n, ceil(h / stride), ceil(w / stride), c), of x's type.
  """
  return jax.lax.platform_dependent(
      x, kernel, cpu=functools.partial(depthwise_shifted, stride=stride),
      default=functools.partial(depthwise_native, stride=stride))


def _depthwise_forward(x, kernel, stride):
  return depthwise(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, inputs, gradient):
  def native(x, kernel, gradient):
    return jax.vjp(functools.partial(depthwise_native, stride=stride), x, kernel)[1](gradient)

  def shifted(x, kernel, gradient):
    return (_shifted_input_gradient(gradient, kernel, stride, x.shape).astype(x.dtype),
            _shifted_kernel_gradient(gradient, x, stride, kernel.shape).astype(kernel.dtype))

  return jax.lax.platform_dependent(*inputs, gradient, cpu=shifted, default=native)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`depthwise` as XLA's grouped convolution: the form for TPU and GPU."""
  return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), "SAME", feature_group_count=x.shape[-1],
      dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.jit, static_argnames="stride")
def depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`depthwise` as a sum over the kernel's taps, in float32: the form for the CPU."""
  size = len(kernel)
  height, width = _result_size(x.shape, stride)
  taps = _wide(kernel)

  def convolve(images):
    images = _padded(images, size, stride)
    return sum(_window(images, i, j, height, width, stride) * taps[i, j, 0]
               for i in range(size) for j in range(size))

  return _apart(convolve, x, kernel).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("stride", "shape"))
def _shifted_input_gradient(gradient, kernel, stride, shape):
  """A sum over shifts of the gradient, for all phases of the image at once."""
  padding = [_padding(length, len(kernel), stride) for length in shape[1:3]]
  taps, margins = _phases(_wide(kernel), stride, padding)
  height, width = _result_size(shape, stride)

  def convolve(gradient):
    gradient = jnp.pad(_wide(gradient), ((0, 0), *margins, (0, 0)))
    phases = sum(_window(gradient, i, j, height, width, 1)[:, :, None, :, None]
                 * taps[i, j, :, None, :, 0]
                 for i in range(len(taps)) for j in range(taps.shape[1]))
    return _of_phases(phases, shape)

  return _apart(convolve, gradient, kernel)


@functools.partial(jax.jit, static_argnames=("stride", "shape"))
def _shifted_kernel_gradient(gradient, x, stride, shape):
  """Per tap: the channels' inner products of the gradient and the shifted image.

  A few images at a time, or one large one, so that all taps find them in the cache. XLA's reduction
  of a 4-d window is slow on the CPU: pieces of equal size are added up elementwise, and a matrix
  product does the rest.
  """
  size, (height, width) = shape[0], _result_size(x.shape, stride)
  large, bands = height * width * shape[3] > LARGE, bands_of(height, width, shape[3])
  rows, images = height // bands, 1 if large else _PIECES

  def tap(x, gradient, i, j):
    products = sum(
        _window(image, i + band * rows * stride, j, rows, width, stride)
        * _window(of_image, band * rows, 0, rows, width, 1)
        for image, of_image in zip(x, gradient, strict=True)
        for band in range(bands)).reshape(-1, shape[3])
    return (jnp.ones((1, len(products)), products.dtype) @ products)[0]

  def add(total, group):
    # Image by image, (1, h, w, c) each.
    x = jnp.split(_padded(group[0], size, stride), images)
    gradient = jnp.split(_wide(group[1]), images)
    return total + jnp.stack([tap(x, gradient, i, j)
                              for i in range(size) for j in range(size)]), None

  zeros = jnp.zeros((size * size, shape[3]), jnp.promote_types(x.dtype, jnp.float32))
  total, _ = jax.lax.scan(add, zeros, (_groups(x, images), _groups(gradient, images)))
  return total.reshape(shape)


def bands_of(height: int, width: int, channels: int) -> int:
  """How many bands of rows a result of this size is cut into for the weight gradient."""
  if height * width * channels <= LARGE:
    return 1
  return max(n for n in range(1, _PIECES + 1) if height % n == 0)


def _phases(kernel, stride, padding):
  """The kernel, seen from the gradient of its convolution, phase by phase of the image.

  Row `stride * r + p` of the image is of phase p. Tap i brings it to row r + m of the result,
  where i = p + before - stride * m: a shift by m for each run of `stride` taps.

  Args:
    kernel: (k, k, inputs, outputs).
    stride: along both axes.
    padding: of the image, (before, after) along both axes.

  Returns:
    The taps, (shifts, shifts, stride, stride, inputs, outputs), zero where the kernel has none, and
    by how many pixels the shifts reach over the result, (before, after) along both axes.
  """
  size, ends, margins = len(kernel), [], []
  for before, _ in padding:
    up, down = (size - 1 - before) // stride, (stride - 1 + before) // stride
    margins.append((up, down))
    ends.append((stride * down - before, stride * (up + 1) + before - size))
  runs = jnp.pad(kernel, (*ends, (0, 0), (0, 0)))
  runs = runs.reshape(-1, stride, sum(margins[1]) + 1, stride, *kernel.shape[2:])
  return jnp.flip(runs, (0, 2)).swapaxes(1, 2), margins


def _of_phases(phases, shape):
  """(n, rows, phases, columns, phases, c) -> images of this shape, (n, h, w, c)."""
  rows, stride, columns = phases.shape[1:4]
  image = phases.reshape(-1, rows * stride, columns * stride, shape[3])
  return image[:, :shape[1], :shape[2]]


def _apart(function, x, kernel):
  """function(x), computed once and kept: in a branch of its own, always taken.

  Without this fence XLA, which on the CPU keeps no optimization_barrier unless it is told to
  (runtime/memory.py), computes all taps again in each of the operations that read the result, and
  what made x again for each tap: 1.1 to 1.4 times as long. What tells the branch is not known to
  the compiler: whether a number of the kernel is one.
  """
  result = jax.eval_shape(function, x)
  return jax.lax.cond(kernel[0, 0, 0, 0] == kernel[0, 0, 0, 0], function,
                      lambda x: jnp.full_like(x, jnp.nan, result.dtype, result.shape), x)


def _groups(x, images):
  """(n, ...) -> (groups, images of a group, ...), filled up with zeros."""
  missing = -len(x) % images
  if missing:
    x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
  return x.reshape(-1, images, *x.shape[1:])


def _padded(x, size, stride):
  """The images in float32, padded as 'SAME' wants it."""
  padding = [_padding(length, size, stride) for length in x.shape[1:3]]
  return jnp.pad(_wide(x), ((0, 0), *padding, (0, 0)))


def _wide(x):
  """x in the type that sums are taken in: float32, or float64 where x has it."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _padding(length, size, stride):
  """TensorFlow's 'SAME': (before, after) along an axis of this length."""
  total = max((-(-length // stride) - 1) * stride + size - length, 0)
  return total // 2, total - total // 2


def _result_size(shape, stride):
  return -(-shape[1] // stride), -(-shape[2] // stride)


def _window(image, i, j, height, width, stride):
  """Every stride-th pixel from row i, column j on: (n, height, width, ...)."""
  rest = image.ndim - 3
  ends = (image.shape[0], i + (height - 1) * stride + 1, j + (width - 1) * stride + 1,
          *image.shape[3:])
  return jax.lax.slice(image, (0, i, j, *[0] * rest), ends, (1, stride, stride, *[1] * rest))
