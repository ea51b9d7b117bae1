"""Attention in plain XLA, chunked over queries: the oracle, and the CPU path."""

import functools
import math

import jax
import jax.numpy as jnp

from longlive_jax.types import Array

MAX_LOGITS = 1 << 25
"""Most logits (float32) held at once; longer calls go through the queries in chunks."""


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    cached_key: Array | None = None,
    cached_value: Array | None = None,
    cached_len: Array | None = None,
) -> Array:
    """Dense attention to `key` and to the first `cached_len` of `cached_key`.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, K, N, H]`.
      value: `[B, K, N, H]`.
      cached_key: `[B, K', N, H]` or None.
      cached_value: `[B, K', N, H]` or None.
      cached_len: int32 `[B]`, valid tokens of the cache, in [0, K'].

    Returns:
      `[B, T, N, H]` in the dtype of `query`.
    """
    batch, query_len, heads, head_dim = query.shape
    keys = key.shape[1] + (0 if cached_key is None else cached_key.shape[1])
    one = functools.partial(
        _attend_chunk,
        key=key,
        value=value,
        cached_key=cached_key,
        cached_value=cached_value,
        cached_len=cached_len,
    )
    chunk = max(1, MAX_LOGITS // (batch * heads * keys))
    if chunk >= query_len:
        return one(query)
    chunks = -(-query_len // chunk)
    chunk = -(-query_len // chunks)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - query_len), (0, 0), (0, 0)))
    split = padded.reshape(batch, chunks, chunk, heads, head_dim).swapaxes(0, 1)  # [chunks, B, t, N, H]
    out = jax.lax.map(jax.checkpoint(one), split).swapaxes(0, 1)
    return out.reshape(batch, chunks * chunk, heads, head_dim)[:, :query_len]


def _attend_chunk(
    query: Array,
    *,
    key: Array,
    value: Array,
    cached_key: Array | None,
    cached_value: Array | None,
    cached_len: Array | None,
) -> Array:
    scale = 1.0 / math.sqrt(query.shape[-1])
    logits = _dot("btnh,bknh->bntk", query, key) * scale
    if cached_key is None or cached_value is None or cached_len is None:
        weights = jax.nn.softmax(logits, axis=-1)
        return _dot("bntk,bknh->btnh", weights.astype(value.dtype), value).astype(query.dtype)
    # Two softmax parts over one normaliser: nothing is concatenated, the cache is read where it lies.
    valid = jnp.arange(cached_key.shape[1]) < cached_len[:, None]  # [B, K']
    cached_logits = _dot("btnh,bknh->bntk", query, cached_key) * scale
    cached_logits = jnp.where(valid[:, None, None, :], cached_logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if cached_key.shape[1]:
        top = jnp.maximum(top, jnp.max(cached_logits, axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    own, cached = jnp.exp(logits - top), jnp.exp(cached_logits - top)
    total = jnp.sum(own, axis=-1) + jnp.sum(cached, axis=-1)  # [B, N, T]
    out = _dot("bntk,bknh->btnh", own.astype(value.dtype), value)
    out = out + _dot("bntk,bknh->btnh", cached.astype(value.dtype), cached_value)
    return (out / total.transpose(0, 2, 1)[..., None]).astype(query.dtype)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
