"""Layers shared by the models: normalisations, the timestep embedding, the two-layer MLP."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.models import rope
from longlive_jax.types import Array


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; statistics in float32, gain in `dtype`.

    The order (normalise in float32, cast, then multiply by the gain) is the release's.
    """

    eps: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype)


def layer_norm(x: Array, *, eps: float, scale: Array | None = None, bias: Array | None = None) -> Array:
    """Layer norm over the last axis, computed in float32, returned in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if scale is not None and bias is not None:
        y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with learned gain and offset."""

    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, eps=self.eps, scale=scale, bias=bias)


def gelu_tanh(x: Array) -> Array:
    """GELU by the tanh approximation, in float32.

    `x (1 + tanh u) / 2` is `x sigmoid(2 u)`: one exponential in place of a tanh's polynomials, which on a
    GPU take longer than moving the numbers.
    """
    y = x.astype(jnp.float32)
    twice = (8 / np.pi) ** 0.5 * (y + 0.044715 * y * y * y)
    return (y * jax.nn.sigmoid(twice)).astype(x.dtype)


class MLP(nn.Module):
    """Linear, activation, linear."""

    hidden_dim: int
    out_dim: int
    activation: Callable[[Array], Array]
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(self.out_dim, name="fc2")(self.activation(dense(self.hidden_dim, name="fc1")(x)))


def timestep_embedding(timesteps: Array, dim: int) -> Array:
    """Sinusoidal embedding, cosine half first.

    The release computes the angles in float64. Here the whole part of the timestep goes through
    exact fixed-point phases and only its fraction through float32, which is as accurate as the
    float32 result can show.

    Args:
      timesteps: float32 `[...]` in [0, 1000], not necessarily whole.
      dim: width, even.

    Returns:
      float32 `[..., dim]`.
    """
    half = dim // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    whole = jnp.floor(timesteps)
    angle = rope.turn_angles(whole.astype(jnp.int32), *rope.frequency_words(frequencies))
    angle = angle + (timesteps - whole)[..., None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
