"""cuDNN's fused attention through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

from longlive_jax.types import Array


def obstacle(query: Array, *, platform: str) -> str | None:
    """Why cuDNN cannot take this call, or None if it can."""
    head_dim = query.shape[-1]
    if platform not in ("gpu", "cuda"):
        return f"the default device is a {platform}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {query.dtype}, not bfloat16 or float16"
    if head_dim % 8 or head_dim > 128:
        return f"head size {head_dim} is not a multiple of 8 up to 128"
    return None


def attend(query: Array, key: Array, value: Array, *, length: Array | None) -> Array:
    """Attention of `[B, T, N, H]` queries to the first `length` `[B]` (or all) of `[B, K, N, H]` keys."""
    queries = None if length is None else jnp.full(query.shape[:1], query.shape[1], jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=queries,
        key_value_seq_lengths=length,
        implementation="cudnn",
    )
