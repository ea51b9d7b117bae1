"""Attention of one video over several devices: by heads as far as these divide, by tokens beyond.

Everything but attention works on single tokens, so each device holds an equal part of every frame's tokens.
For attention, devices along the `heads` axis trade tokens for heads (Ulysses, arXiv 2309.14509). What is left
along the `tokens` axis does not trade keys: each device keeps its part of the cache, all queries of a group
visit all parts, and the partial results are joined by their log-sum-exp. A block has a few frames of queries
and a whole window of keys, so queries and results are the smaller parcel.

The functions run inside of `jax.shard_map`, on one device's part of each array.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from longlive_jax.config import AttentionImplementation
from longlive_jax.ops.windowed_attention.api import CachedContext, windowed_attention, windowed_attention_lse
from longlive_jax.types import Array

TOKENS, HEADS = "tokens", "heads"
"""Names of the mesh axes."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Spread:
    """How many devices share one video; a frame's tokens are split over `tokens * heads` of them.

    Attributes:
      tokens: devices that hold different tokens of the cache.
      heads: devices that hold different heads of it; divides the number of heads.
    """

    tokens: int
    heads: int

    @property
    def devices(self) -> int:
        return self.tokens * self.heads

    def share(self, tree: T, *, axis: int) -> T:
        """This device's part of arrays that are whole on each, split along the axis of a frame's tokens."""
        index = jax.lax.axis_index((TOKENS, HEADS))

        def one(x: Array) -> Array:
            size = x.shape[axis] // self.devices
            return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

        return jax.tree.map(one, tree)

    def whole(self, x: Array, *, axis: int) -> Array:
        """What `share` was given, on every device."""
        return jax.lax.all_gather(x, (TOKENS, HEADS), axis=axis, tiled=True)


def spread_attention(
    query: Array,
    key: Array,
    value: Array,
    context: CachedContext | None,
    *,
    spread: Spread,
    implementation: AttentionImplementation = "auto",
) -> tuple[Array, Array, Array]:
    """`windowed_attention` over the keys of all devices of a video.

    Args:
      query: `[B, F, P / (tokens * heads), N, H]`, this device's tokens.
      key: like `query`.
      value: like `query`.
      context: this device's part of the cache, `P / tokens` tokens of each frame and `N / heads` heads.
      spread: how the devices share.
      implementation: as for `windowed_attention`; with `tokens > 1` as for `windowed_attention_lse`.

    Returns:
      The result, in the shape of `query`; then keys and values as this device's part of the cache wants
      them, `[B, F, P / tokens, N / heads, H]`.
    """
    query, key, value = (_tokens_for_heads(x, spread) for x in (query, key, value))
    if spread.tokens > 1:
        out = _visit_all(query, key, value, context, spread, implementation)
    else:
        out = windowed_attention(
            *(_flat(x) for x in (query, key, value)), context=context, implementation=implementation
        ).reshape(query.shape)
    return _heads_for_tokens(out, spread), key, value


def _visit_all(
    query: Array,
    key: Array,
    value: Array,
    context: CachedContext | None,
    spread: Spread,
    implementation: AttentionImplementation,
) -> Array:
    """The queries of all devices meet the keys of each; every device gets the answers to its own."""
    queries = jax.lax.all_gather(query, TOKENS, axis=2, tiled=True)  # [B, F, P, N', H]
    out, lse = windowed_attention_lse(
        *(_flat(x) for x in (queries, key, value)), context=context, implementation=implementation
    )
    lse = lse.swapaxes(1, 2).reshape(queries.shape[:-1])  # [B, F, P, N']
    out, lse = (_answers(x, spread) for x in (out.reshape(queries.shape), lse))
    weights = jax.nn.softmax(lse, axis=0)[..., None]
    return jnp.sum(weights * out.astype(jnp.float32), axis=0).astype(query.dtype)


def _answers(x: Array, spread: Spread) -> Array:
    """`[B, F, P, ...]` of all queries to `[tokens, B, F, P / tokens, ...]`, all devices' for one's own."""
    x = x.reshape(*x.shape[:2], spread.tokens, -1, *x.shape[3:])
    return jax.lax.all_to_all(x, TOKENS, split_axis=2, concat_axis=0)


def _tokens_for_heads(x: Array, spread: Spread) -> Array:
    """`[B, F, P', N, H]` to `[B, F, P' * heads, N / heads, H]`."""
    return x if spread.heads == 1 else jax.lax.all_to_all(x, HEADS, split_axis=3, concat_axis=2, tiled=True)


def _heads_for_tokens(x: Array, spread: Spread) -> Array:
    return x if spread.heads == 1 else jax.lax.all_to_all(x, HEADS, split_axis=2, concat_axis=3, tiled=True)


def _flat(x: Array) -> Array:
    """`[B, F, P, N, H]` to `[B, T, N, H]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
