"""The one attention of the product and the choice of its implementation.

Queries attend densely to the keys that come with them and, where given, to a cached context in
front of them. Attention does not depend on the order of its keys, so the context may be a ring in
any rotation; its valid slots are always a prefix, so the only mask is a length.

Precision, whatever the implementation: products accumulate in float32; scale, softmax and log-sum-exp are
float32; the weights are rounded to the dtype of `value` before the second product and the sum they are
divided by is that of the unrounded ones; the result is rounded once to the dtype of `query`.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.config import AttentionImplementation
from longlive_jax.errors import UserError, require
from longlive_jax.ops.windowed_attention import cudnn, reference
from longlive_jax.quantize.numerics import Quantized
from longlive_jax.types import Array, pytree

_logger = logging.getLogger(__name__)


@pytree
class CachedContext:
    """Keys and values kept from earlier blocks.

    Attributes:
      key: `[B, K, N, H]`, already rotated. With a leading layer axis, `[L, B, K, N, H]`, where `layer` says
        which one is meant (a batch of one may leave its axis out), and outside the layer scan. In 8 bits a
        `Quantized` whose frames are apart, `[B, S, P, N, H]`.
      value: like `key`.
      length: int32 `[B]`; only the first `length` of the K tokens are attended to.
      layer: int32 scalar or None. A kernel that takes the whole cache and a number reads it where it lies; a
        slice of it would be a copy.
    """

    key: Array | Quantized
    value: Array | Quantized
    length: Array
    layer: Array | None = None

    def sliced(self) -> "CachedContext":
        """The one layer that is meant, a copy of it unless the compiler can do without."""
        if self.layer is None:
            return self
        index, batch = self.layer, self.length.shape[0]

        def one(x: Array, axes: int) -> Array:
            x = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            return x.reshape(batch, *x.shape[x.ndim - axes :])

        def part(x: Array | Quantized) -> Array | Quantized:
            axes = 4 if isinstance(x, Quantized) else 3  # behind the batch
            return jax.tree.map(lambda leaf: one(leaf, axes), x)

        return CachedContext(part(self.key), part(self.value), self.length)


def windowed_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    context: CachedContext | None = None,
    implementation: AttentionImplementation = "auto",
) -> Array:
    """Softmax attention with scale 1/sqrt(H).

    Args:
      query: `[B, T, N, H]`.
      key: `[B, K, N, H]`, attended to in full.
      value: `[B, K, N, H]`.
      context: further keys and values, attended to up to their length.
      implementation: "reference" runs everywhere; "cudnn" needs a GPU, float16 or bfloat16 and a head
        size that is a multiple of 8 up to 128; "pallas_mosaic_gpu" needs a Hopper GPU (H100, H200), float16
        or bfloat16, a head size of 64 or 128 and a cache of a multiple of 8 tokens. "auto" takes
        pallas_mosaic_gpu where it can run and there is a cached context, cudnn where that can run, and
        the reference elsewhere; on a GPU a warning then says why.

    Returns:
      `[B, T, N, H]` in the dtype of `query`.

    Raises:
      UserError: an implementation was asked for where it cannot run.
    """
    chosen = choose(query, implementation, context)
    if chosen == "cudnn":
        return _attend_cudnn(query, key, value, **_cached(context, query.dtype))
    return _attend(query, key, value, context, chosen)[0]


def windowed_attention_lse(
    query: Array,
    key: Array,
    value: Array,
    *,
    context: CachedContext | None = None,
    implementation: AttentionImplementation = "auto",
) -> tuple[Array, Array]:
    """`windowed_attention` and the log-sum-exp of its logits, with which several results can be joined.

    The arguments are those of `windowed_attention`, but cuDNN cannot do it: its log-sum-exp comes rounded to
    the dtype of the query. "auto" takes pallas_mosaic_gpu where it can run, the reference elsewhere (on a GPU
    a warning then says why).

    Returns:
      `[B, T, N, H]` in the dtype of `query`, and float32 `[B, N, T]`.

    Raises:
      UserError: an implementation was asked for where it cannot run.
    """
    require(implementation != "cudnn", "attention='cudnn' gives no log-sum-exp; use 'pallas_mosaic_gpu'")
    if implementation == "auto":
        implementation = _first_without_obstacle(("pallas_mosaic_gpu",), query, context)
    return _attend(query, key, value, context, choose(query, implementation, context))


def choose(
    query: Array, implementation: AttentionImplementation, context: CachedContext | None = None
) -> AttentionImplementation:
    """The implementation that a call gets on the default device.

    What "auto" takes is what was faster on an H200 (`benchmarks/results/suite_gpu.json`): over a cache, which
    has no gradient, our kernel at every length; with gradients, cuDNN.

    Raises:
      UserError: one was asked for where it cannot run; nothing else takes its place.
    """
    if implementation == "auto":
        if context is None:
            return _first_without_obstacle(("cudnn",), query, context)
        return _first_without_obstacle(("pallas_mosaic_gpu", "cudnn"), query, context)
    obstacle = _obstacle(implementation, query)
    if obstacle:
        raise UserError(
            f"attention={implementation!r} cannot run here ({obstacle}); use 'reference' or 'auto'"
        )
    return implementation


def _first_without_obstacle(
    preferred: Sequence[AttentionImplementation], query: Array, context: CachedContext | None
) -> AttentionImplementation:
    """The first implementation that can take this call; else the reference, which a GPU's user is told."""
    obstacles = {}
    for name in preferred:
        obstacle = _obstacle(name, query) or (_unaligned(context) if name == "pallas_mosaic_gpu" else None)
        if obstacle is None:
            return name
        obstacles[name] = obstacle
    if jax.default_backend() != "cpu":
        _warn_once("; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items()))
    return "reference"


@functools.cache
def _warn_once(obstacles: str) -> None:
    _logger.warning("attention='auto' takes the slow reference (%s)", obstacles)


def _obstacle(implementation: AttentionImplementation, query: Array) -> str | None:
    """Why an implementation cannot take such queries on the default device, or None if it can."""
    platform = jax.default_backend()
    if implementation == "cudnn":
        return cudnn.obstacle(query, platform=platform)
    if implementation == "pallas_mosaic_gpu":
        return _pallas().obstacle(query, platform=platform)
    return None


def _unaligned(context: CachedContext | None) -> str | None:
    """Why the Pallas kernel cannot read a cache, or None if it can; one in 8 bits is made dense first."""
    if context is None:
        return None
    shape, rows = context.key.shape, _pallas().ROWS
    tokens = math.prod(shape[-4:-2]) if isinstance(context.key, Quantized) else shape[-3]
    return f"the cache has {tokens} tokens, not {rows} n" if tokens % rows else None


def _pallas() -> Any:
    from longlive_jax.ops.windowed_attention import pallas_mosaic_gpu  # takes a second to import

    return pallas_mosaic_gpu


def _attend(
    query: Array,
    key: Array,
    value: Array,
    context: CachedContext | None,
    implementation: AttentionImplementation,
) -> tuple[Array, Array]:
    if implementation == "reference" or context is None or isinstance(context.key, Quantized):
        implemented = reference if implementation == "reference" else _pallas()
        return implemented.attend_lse(query, key, value, **_cached(context, query.dtype))
    return _pallas().attend_lse(
        query,
        key,
        value,
        cached_key=context.key,
        cached_value=context.value,
        cached_len=context.length,
        layer=context.layer,
    )


def _cached(context: CachedContext | None, dtype: jnp.dtype) -> dict[str, Array]:
    """The keyword arguments of the implementations that take one layer's dense keys and values."""
    if context is None:
        return {}
    context = context.sliced()

    def dense(x: Array | Quantized) -> Array:
        if isinstance(x, Quantized):
            x = x.dense(dtype)  # [B, S, P, N, H]
            return x.reshape(x.shape[0], -1, *x.shape[3:])
        return x

    return {
        "cached_key": dense(context.key),
        "cached_value": dense(context.value),
        "cached_len": context.length,
    }


def _attend_cudnn(
    query: Array,
    key: Array,
    value: Array,
    *,
    cached_key: Array | None = None,
    cached_value: Array | None = None,
    cached_len: Array | None = None,
) -> Array:
    if cached_key is None or cached_value is None or cached_len is None:
        return cudnn.attend(query, key, value, length=None)
    # cuDNN takes one buffer and a length, so the always-valid own keys go in front.
    joined_key = jnp.concatenate([key, cached_key], axis=1)
    joined_value = jnp.concatenate([value, cached_value], axis=1)
    return cudnn.attend(query, joined_key, joined_value, length=cached_len + key.shape[1])
