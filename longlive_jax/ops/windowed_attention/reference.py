"""Attention in plain XLA: the oracle for every other implementation, and the CPU path.

Long calls go through the heads and the queries piece by piece. That bounds the memory, and on a CPU it
is more than twice as fast: the logits of a piece stay in the cache between the two products
(`benchmarks/transformer_forward.py`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.types import Array

CPU_LOGITS = 1 << 21
"""Most logits (float32) of one piece on a CPU: about what its last-level cache holds."""
LOGITS = 1 << 27
"""Elsewhere: half a gigabyte."""


def attend(query: Array, key: Array, value: Array, **cached: Array) -> Array:
    """The first result of `attend_lse`, which takes the same arguments."""
    return attend_lse(query, key, value, **cached)[0]


def attend_lse(
    query: Array,
    key: Array,
    value: Array,
    *,
    cached_key: Array | None = None,
    cached_value: Array | None = None,
    cached_len: Array | None = None,
) -> tuple[Array, Array]:
    """Dense attention to `key` and to the first `cached_len` of `cached_key`.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, K, N, H]`.
      value: `[B, K, N, H]`.
      cached_key: `[B, K', N, H]` or None.
      cached_value: `[B, K', N, H]` or None.
      cached_len: int32 `[B]`, valid tokens of the cache, in [0, K'].

    Returns:
      `[B, T, N, H]` in the dtype of `query`, and float32 `[B, N, T]`, the log-sum-exp of the logits.
    """
    batch, query_len, heads, _ = query.shape
    row = batch * (key.shape[1] + (0 if cached_key is None else cached_key.shape[1]))
    budget = CPU_LOGITS if jax.default_backend() == "cpu" else LOGITS
    group = _largest_divisor(heads, at_most=budget // (row * query_len))
    chunk = query_len if group else max(1, budget // row)

    def split(x: Array) -> Array:  # [B, T, N, H] to [N / group, group, B, T, H]
        return x.transpose(2, 0, 1, 3).reshape(-1, group or 1, batch, x.shape[1], x.shape[3])

    def one_group(arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        head_query, *rest = arrays
        run = functools.partial(_attend, context=tuple(rest), cached_len=cached_len)
        return run(head_query) if chunk == query_len else _by_chunks(run, head_query, chunk)

    present = [x for x in (query, key, value, cached_key, cached_value) if x is not None]
    out, lse = _map(one_group, tuple(split(x) for x in present))
    out = out.reshape(heads, batch, query_len, -1).transpose(1, 2, 0, 3)
    return out, lse.reshape(heads, batch, query_len).transpose(1, 0, 2)


def _by_chunks(run: Callable[[Array], tuple[Array, Array]], query: Array, chunk: int) -> tuple[Array, Array]:
    """Applies `run` to `[G, B, T, H]` queries in equal chunks of at most about `chunk`."""
    query_len = query.shape[2]
    count = -(-query_len // chunk)
    chunk = -(-query_len // count)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, count * chunk - query_len), (0, 0)))
    pieces = padded.reshape(*query.shape[:2], count, chunk, -1).transpose(2, 0, 1, 3, 4)

    def join(x: Array) -> Array:  # [count, G, B, chunk, ...] to [G, B, T, ...]
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*query.shape[:2], count * chunk, *x.shape[4:])[:, :, :query_len]

    out, lse = jax.lax.map(jax.checkpoint(run), pieces)
    return join(out), join(lse)


def _attend(query: Array, *, context: tuple[Array, ...], cached_len: Array | None) -> tuple[Array, Array]:
    """Attention of `[G, B, T, H]` to (key, value) or (key, value, cached_key, cached_value).

    The own keys and the cached ones are two parts under one normaliser: nothing is concatenated, the
    cache is read where it lies.
    """
    scale = 1.0 / math.sqrt(query.shape[-1])
    keys, values = context[::2], context[1::2]
    logits = [_dot("gbth,gbkh->gbtk", query, key) * scale for key in keys]
    if cached_len is not None:
        valid = jnp.arange(keys[1].shape[2]) < cached_len[:, None]  # [B, K']
        logits[1] = jnp.where(valid[:, None, :], logits[1], -jnp.inf)
    tops = [jnp.max(part, axis=-1, keepdims=True) for part in logits]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    weights = [jnp.exp(part - top) for part in logits]
    total: Any = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    out: Any = sum(
        _dot("gbtk,gbkh->gbth", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True)
    )
    return (out / total).astype(query.dtype), (top + jnp.log(total))[..., 0]


def _map(run: Callable[[tuple[Array, ...]], Any], arrays: tuple[Array, ...]) -> Any:
    """`jax.lax.map` that is a plain call where there is only one piece."""
    if arrays[0].shape[0] == 1:
        return run(tuple(x[0] for x in arrays))
    return jax.lax.map(run, arrays)


def _largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`; 0 if there is none."""
    return max((d for d in range(1, min(number, at_most) + 1) if number % d == 0), default=0)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
