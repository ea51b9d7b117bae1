"""The Pallas kernels for Hopper GPUs as one differentiable operation; see `mosaic_gpu_forward`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.errors import require
from longlive_jax.ops.windowed_attention import mosaic_gpu_backward as backward
from longlive_jax.ops.windowed_attention import mosaic_gpu_forward as forward
from longlive_jax.ops.windowed_attention import tiling as tilings
from longlive_jax.ops.windowed_attention.mosaic_gpu_parts import COMPUTE_GROUPS, LOG2E
from longlive_jax.ops.windowed_attention.tiling import BackwardTiling, Tiling
from longlive_jax.types import Array

HEAD_DIMS = (64, 128)
ROWS = 8
"""The copy engine's tiles have so many tokens; arrays end at any multiple of it."""

CAPABILITY = "9.0"


def obstacle(query: Array, *, platform: str) -> str | None:
    """Why the kernels cannot take this call, or None if they can."""
    if platform not in ("gpu", "cuda"):
        return f"the default device is a {platform}"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability != CAPABILITY:
        return f"the device has compute capability {capability}, not {CAPABILITY} (Hopper)"
    return unfit(query)


def unfit(query: Array) -> str | None:
    """What of the call itself does not suit the kernels, whatever the device."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {query.dtype}, not bfloat16 or float16"
    if query.shape[-1] not in HEAD_DIMS:
        return f"head size {query.shape[-1]} is not one of {HEAD_DIMS}"
    return None


def attend_lse(
    query: Array,
    key: Array,
    value: Array,
    *,
    cached_key: Array | None = None,
    cached_value: Array | None = None,
    cached_len: Array | None = None,
    layer: Array | None = None,
    tiling: Tiling | None = None,
) -> tuple[Array, Array]:
    """Dense attention to `key` and to the first `cached_len` of `cached_key`, read where they lie.

    Args:
      query: `[B, T, N, H]` bfloat16 or float16.
      key: `[B, K, N, H]`.
      value: `[B, K, N, H]`.
      cached_key: `[B, K', N, H]`, or `[L, B, K', N, H]` or `[L * B, K', N, H]` with `layer`, or None.
      cached_value: like `cached_key`.
      cached_len: int32 `[B]`, valid tokens of the cache, in [0, K'].
      layer: int32 scalar; which of the L caches.
      tiling: how the work is cut; by default as `tiling.choose` says.

    T and K are padded where they are no multiples of 8 (those of a Wan model are); K' has to be one, as a
    padded cache would be a copy of it.

    Returns:
      `[B, T, N, H]` in the dtype of `query`, and float32 `[B, N, T]`, the log-sum-exp of the logits.

    Raises:
      UserError: K' is not a multiple of 8.
    """
    batch, query_len, heads, head_dim = query.shape
    cached = 0 if cached_key is None else cached_key.shape[-3]
    require(
        cached % ROWS == 0,
        f"attention='pallas_mosaic_gpu' takes a cache of {ROWS} n tokens, not of {cached}; use 'auto'",
    )
    if tiling is None:
        problem = tilings.Problem(batch, heads, query_len, key.shape[1] + cached, head_dim)
        device = jax.devices()[0]
        tiling = tilings.choose(
            problem, device_kind=device.device_kind, multiprocessors=getattr(device, "core_count", 132)
        )
    cache = None
    if cached_key is not None and cached_value is not None and cached_len is not None and cached > 0:
        rows = jnp.arange(batch, dtype=jnp.int32)
        if layer is not None:
            rows = rows + layer.astype(jnp.int32) * batch
        stacked = (x.reshape(-1, *x.shape[-3:]) for x in (cached_key, cached_value))
        cache = (*stacked, rows, cached_len)
    out, lse = _attend(*(_whole_rows(x) for x in (query, key, value)), cache, tiling, key.shape[1])
    return out[:, :query_len], lse[..., :query_len]


def _whole_rows(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % ROWS), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    query: Array, key: Array, value: Array, cache: Any, tiling: Tiling, own: int
) -> tuple[Array, Array]:
    return forward.forward(query, key, value, cache, tiling=tiling, own=own)


def _attend_forward(query: Array, key: Array, value: Array, cache: Any, tiling: Tiling, own: int) -> Any:
    out, lse = forward.forward(query, key, value, cache, tiling=tiling, own=own)
    return (out, lse), (query, key, value, cache, out, lse)


def _attend_backward(tiling: Tiling, own: int, kept: Any, gradients: tuple[Array, Array]) -> Any:
    return gradients_of(kept, gradients, tiling=BackwardTiling(), own=own)


_attend.defvjp(_attend_forward, _attend_backward)


def gradients_of(
    kept: Any,
    gradients: tuple[Array, Array],
    *,
    tiling: BackwardTiling,
    own: int,
    interpret: Any = None,
) -> Any:
    """Gradients of `_attend`'s arguments.

    Args:
      kept: (query, key, value, cache, out, lse) of the forward pass.
      gradients: those of `out` and `lse`.
      tiling: how the work is cut.
      own: how many of the own keys are valid.
      interpret: passed to Pallas.
    """
    query, key, value, cache, out, lse = kept
    out_gradient, lse_gradient = gradients
    batch, query_len = query.shape[:2]
    # The log-sum-exp's own gradient enters where the normaliser's does.
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), out_gradient.astype(jnp.float32))
    unit = np.lcm(COMPUTE_GROUPS * tiling.block_q, tiling.block_stream)
    fill = ((0, 0), (0, 0), (0, -query_len % int(unit)))
    lines = (jnp.pad(x, fill) for x in (lse * LOG2E, delta - lse_gradient))
    queries = backward.Queries(query, out_gradient.astype(query.dtype), *lines)

    def of(keys: backward.Keys) -> tuple[Array, Array, Array]:
        part = backward.query_gradient(queries, keys, tiling=tiling, interpret=interpret)
        return part, *backward.key_gradients(queries, keys, tiling=tiling, interpret=interpret)

    everyone = jnp.arange(batch, dtype=jnp.int32)
    lengths = jnp.full(batch, own, jnp.int32)
    query_gradient, key_gradient, value_gradient = of(backward.Keys(key, value, everyone, lengths))
    if cache is None:
        return query_gradient, key_gradient, value_gradient, None
    cached_key, cached_value, rows, lengths = cache
    more, *found = of(backward.Keys(cached_key, cached_value, rows, lengths))
    total = (query_gradient.astype(jnp.float32) + more.astype(jnp.float32)).astype(query.dtype)
    placed = [
        jnp.zeros_like(x).at[rows].set(g) for x, g in zip((cached_key, cached_value), found, strict=True)
    ]
    none = [np.zeros(x.shape, jax.dtypes.float0) for x in (rows, lengths)]
    return total, key_gradient, value_gradient, (*placed, *none)
