"""The one attention of the product and the choice of its implementation.

Queries attend densely to the keys that come with them and, where given, to a cached context in
front of them. Attention does not depend on the order of its keys, so the context may be a ring in
any rotation; its valid slots are always a prefix, so the only mask is a length.
"""

import jax
import jax.numpy as jnp

from longlive_jax.config import AttentionImplementation
from longlive_jax.errors import UserError
from longlive_jax.ops.windowed_attention import cudnn, reference
from longlive_jax.types import Array, pytree


@pytree
class CachedContext:
    """Keys and values kept from earlier blocks.

    Attributes:
      key: `[B, K, N, H]`, already rotated (with a leading layer axis outside the layer scan).
      value: `[B, K, N, H]`.
      length: int32 `[B]`; only the first `length` of the K tokens are attended to.
    """

    key: Array
    value: Array
    length: Array


def windowed_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    context: CachedContext | None = None,
    implementation: AttentionImplementation = "auto",
) -> Array:
    """Softmax attention with scale 1/sqrt(H).

    Products accumulate in float32 and the softmax is float32, whatever the input dtype; the
    probabilities are rounded to the dtype of `value` before the second product.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, K, N, H]`, attended to in full.
      value: `[B, K, N, H]`.
      context: further keys and values, attended to up to their length.
      implementation: "reference" runs everywhere; "cudnn" needs a GPU, float16 or bfloat16 and a head
        size that is a multiple of 8 up to 128; "auto" takes cudnn exactly where it can run.

    Returns:
      `[B, T, N, H]` in the dtype of `query`.

    Raises:
      UserError: "cudnn" was asked for where it cannot run.
    """
    obstacle = cudnn.obstacle(query, platform=jax.default_backend())
    if implementation == "cudnn" and obstacle:
        raise UserError(f"attention='cudnn' cannot run here ({obstacle}); use 'reference' or 'auto'")
    if implementation == "cudnn" or (implementation == "auto" and not obstacle):
        return _attend_cudnn(query, key, value, context)
    if context is None:
        return reference.attend(query, key, value)
    return reference.attend(
        query, key, value, cached_key=context.key, cached_value=context.value, cached_len=context.length
    )


def _attend_cudnn(query: Array, key: Array, value: Array, context: CachedContext | None) -> Array:
    if context is None:
        return cudnn.attend(query, key, value, length=None)
    # cuDNN takes one buffer and a length, so the always-valid own keys go in front.
    joined_key = jnp.concatenate([key, context.key], axis=1)
    joined_value = jnp.concatenate([value, context.value], axis=1)
    return cudnn.attend(query, joined_key, joined_value, length=context.length + key.shape[1])
