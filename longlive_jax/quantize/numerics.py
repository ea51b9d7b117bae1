"""8-bit numbers with scales: how arrays become them, and the linear layer that multiplies them.

Symmetric and without zero points: `x ~ values * scale`, the scale taken from the largest absolute value
along the reduced axis. Activations are scaled per token when they are met (no calibration), weights per
output channel when they are stored. Nothing here knows of models, caches or Flax.
"""

import functools
import math
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.types import Array, pytree

EightBit: TypeAlias = Literal["int8", "fp8"]
"""int8 in [-127, 127], or fp8 with 4 exponent and 3 mantissa bits (e4m3, largest value 448)."""

EIGHT_BIT: tuple[EightBit, ...] = get_args(EightBit)

_DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_ROTATED = 128  # channels of a group: the cost grows with it, and outliers are few
_SMALLEST_SCALE = 1e-12  # of a row of zeros; its values are zeros whatever the scale


def dtype_of(kind: EightBit) -> jnp.dtype:
    """The array dtype of a kind."""
    return _DTYPES[kind]


def kind_of(values: Any) -> EightBit | None:
    """The kind an array (or a shape) is stored in; None if it is not one of 8 bits."""
    return next((kind for kind in EIGHT_BIT if _DTYPES[kind] == values.dtype), None)


def quantize(
    x: Array, kind: EightBit, *, axis: int, scale_dtype: jnp.dtype | type = jnp.float32
) -> tuple[Array, Array]:
    """Rounds an array to 8 bits with one scale per row along `axis`.

    Args:
      x: float array of any shape.
      kind: the number format.
      axis: the axis that shares a scale.
      scale_dtype: precision the scale is stored in. The values belong to the rounded scale, so a short
        one costs range (half a percent in bfloat16), not accuracy.

    Returns:
      The values, in the shape of `x`, and the scale, with size 1 along `axis`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.maximum(largest / _LARGEST[kind], _SMALLEST_SCALE).astype(scale_dtype)
    values = x / scale.astype(jnp.float32)
    values = jnp.clip(values, -_LARGEST[kind], _LARGEST[kind])
    return (jnp.round(values) if kind == "int8" else values).astype(_DTYPES[kind]), scale


def rotate(x: Array, *, axis: int) -> Array:
    """Mixes channels in groups with an orthogonal Hadamard matrix, which is its own inverse.

    Rotating the input and the kernel of a linear layer changes nothing but the rounding: what a few large
    channels hold is spread over their group, and no longer decides the scale of the others.

    Args:
      x: float array.
      axis: the channels. Groups are as large as powers of two divide them, at most 128.

    Returns:
      Float32, in the shape of `x`.

    Source: QuaRot (arXiv 2404.00456).
    """
    x = jnp.moveaxis(x, axis, -1)
    size = math.gcd(x.shape[-1], _ROTATED)
    groups = x.reshape(*x.shape[:-1], -1, size)
    # Ones are exact in any precision; the factor that makes the matrix orthogonal is not.
    signs = jnp.asarray(_hadamard(size), x.dtype)
    turned = jnp.einsum("...i,ij->...j", groups, signs, preferred_element_type=jnp.float32) * size**-0.5
    return jnp.moveaxis(turned.reshape(x.shape), -1, axis)


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two, of ones and minus ones."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def linear(
    x: Array,
    kernel: Array,
    scale: Array,
    *,
    bias: Array | None,
    quantizes_input: bool,
    dtype: jnp.dtype | type,
    rotates: bool = False,
) -> Array:
    """A linear layer whose kernel is stored in 8 bits.

    Args:
      x: float `[..., in]`.
      kernel: int8 or fp8 `[in, out]`.
      scale: float32 `[1, out]`.
      bias: `[out]` or None.
      quantizes_input: round `x` to the kernel's format token by token, so that the product itself is one of
        integers (accumulated in int32) or of fp8 (in float32). Otherwise the kernel is widened to `dtype`,
        which holds its values exactly, and the scale is applied to the product.
      dtype: precision of the result.
      rotates: the kernel was stored rotated, so the input has to be, too; see `rotate`.

    Returns:
      `[..., out]` in `dtype`.
    """
    kind = kind_of(kernel)
    if kind is None or scale.shape != (1, kernel.shape[1]):
        raise ValueError(
            f"kernel {kernel.dtype}{kernel.shape} with scale {scale.shape}; expected (1, {kernel.shape[1]})"
        )
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    if rotates:
        x = rotate(x, axis=-1)
    if quantizes_input:
        values, x_scale = quantize(x, kind, axis=-1)
        accumulator = jnp.int32 if kind == "int8" else jnp.float32
        # Full precision is about float32 operands; asked for here it would keep fp8 units idle.
        y = jax.lax.dot_general(
            values, kernel, contract, precision="default", preferred_element_type=accumulator
        )
        y = y.astype(jnp.float32) * x_scale * scale[0]
    else:
        y = jax.lax.dot_general(
            x.astype(dtype), kernel.astype(dtype), contract, preferred_element_type=jnp.float32
        )
        y = y * scale[0]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(dtype)


@pytree
class Quantized:
    """An array `[..., P, N, H]` of keys or values in 8 bits: `values * scale + centre`.

    The parts keep the axes of the whole, with size 1 where they are shared: what indexes or copies
    frames of an array does the same to these, leaf by leaf.

    Attributes:
      values: int8 or fp8 `[..., P, N, H]`.
      scale: bfloat16 `[..., P, N, 1]`, one per token and head.
      centre: bfloat16 `[..., 1, N, H]`, mean over the tokens of a frame, or None.
    """

    values: Array
    scale: Array
    centre: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array this stands for."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values as they are stored."""
        return self.values.dtype

    def dense(self, dtype: jnp.dtype | type) -> Array:
        """The array itself, `[..., P, N, H]`."""
        x = self.values.astype(jnp.float32) * self.scale.astype(jnp.float32)
        if self.centre is not None:
            x = x + self.centre.astype(jnp.float32)
        return x.astype(dtype)


def quantize_tokens(x: Array, kind: EightBit, *, centred: bool) -> Quantized:
    """Keys or values `[..., P, N, H]` in 8 bits, with a scale per token and head.

    Args:
      x: float array.
      kind: the number format.
      centred: take the frame's mean out first. Keys have channels that are far from zero in every token;
        without the mean these no longer decide the scale of all others.
    """
    centre = None
    if centred:
        centre = jnp.mean(x.astype(jnp.float32), axis=-3, keepdims=True).astype(jnp.bfloat16)
        x = x.astype(jnp.float32) - centre.astype(jnp.float32)
    values, scale = quantize(x, kind, axis=-1, scale_dtype=jnp.bfloat16)
    return Quantized(values, scale, centre)


def empty_tokens(shape: tuple[int, ...], kind: EightBit, *, centred: bool) -> Quantized:
    """A `Quantized` of zeros that stands for an array of `shape` `[..., P, N, H]`."""
    *lead, tokens, heads, width = shape
    centre = jnp.zeros((*lead, 1, heads, width), jnp.bfloat16) if centred else None
    return Quantized(
        jnp.zeros(shape, _DTYPES[kind]), jnp.zeros((*lead, tokens, heads, 1), jnp.bfloat16), centre
    )
