"""All blocks of a clip at once: each attends to itself and to the frames it may look back at.

What one block after another would find in the cache is laid out as a *timeline* of frames: the
frames kept from before the clip (the sink first, then the latest in order of time), then the clip's
own. A block that starts at timeline frame `t` looks back at the first `sink_frames` frames and at
the latest ones before `t`, as many as the window holds. The pattern is static, so every block is one
dense call and nothing is masked.
"""

import jax
import jax.numpy as jnp

from longlive_jax.config import AttentionImplementation, WindowConfig
from longlive_jax.ops.windowed_attention.api import windowed_attention
from longlive_jax.types import Array, pytree, static


@pytree
class ClipContext:
    """Keys and values that the blocks of a clip of F frames attend to besides their own.

    Attributes:
      key: `[B, A + F, P, N, H]`, rotated: A frames kept from before the clip, then the clip's own as the
        cache would hold them (with a leading layer axis outside the layer scan).
      value: `[B, A + F, P, N, H]`.
      through: float32 `[F]`, 1 for frames that later blocks send a straight-through gradient to: there
        the kept keys and values are used, and their gradient goes to those of this pass. None: no
        gradient leaves a block for an earlier one.
      window: window, sink and block (static).
    """

    key: Array
    value: Array
    through: Array | None
    window: WindowConfig = static()


def clip_attention(
    query: Array,
    key: Array,
    value: Array,
    context: ClipContext,
    *,
    implementation: AttentionImplementation = "auto",
) -> Array:
    """Attention of every block of a clip to its own frames and to those it looks back at.

    Args:
      query: `[B, F, P, N, H]`; F is a multiple of the block.
      key: `[B, F, P, N, H]`, this pass's own.
      value: `[B, F, P, N, H]`.
      context: what earlier frames left behind.
      implementation: as in `windowed_attention`.

    Returns:
      `[B, F, P, N, H]` in the dtype of `query`.
    """
    frames, block = query.shape[1], context.window.block_frames
    kept_key = _straight_through(context.key, key, context.through)
    kept_value = _straight_through(context.value, value, context.through)
    past = kept_key.shape[1] - frames
    outputs = []
    for start in range(0, frames, block):
        own = slice(start, start + block)
        seen = visible_frames(context.window, past + start)
        keys = jnp.concatenate([*(kept_key[:, s] for s in seen), key[:, own]], axis=1)
        values = jnp.concatenate([*(kept_value[:, s] for s in seen), value[:, own]], axis=1)
        out = windowed_attention(
            *(_tokens(a) for a in (query[:, own], keys, values)), implementation=implementation
        )
        outputs.append(out.reshape(query[:, own].shape))
    return jnp.concatenate(outputs, axis=1)


def visible_frames(window: WindowConfig, start: int) -> tuple[slice, slice]:
    """Timeline frames that a block starting at timeline frame `start` looks back at: sink and latest."""
    sink = min(window.sink_frames, start)
    latest = window.cache_frames() - window.sink_frames if window.is_bounded else start
    return slice(0, sink), slice(max(sink, start - latest), start)


def _straight_through(kept: Array, own: Array, through: Array | None) -> Array:
    """`kept`, with the gradient of its last frames sent to `own` where `through` says so."""
    if through is None:
        return kept
    path = (own - jax.lax.stop_gradient(own)) * through[:, None, None, None].astype(own.dtype)
    past = kept.shape[1] - own.shape[1]
    return kept + jnp.pad(path, ((0, 0), (past, 0), *((0, 0),) * 3)).astype(kept.dtype)


def _tokens(x: Array) -> Array:
    """`[B, F, P, N, H]` to `[B, T, N, H]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
