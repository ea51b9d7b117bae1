"""Dense attention over a cached context and the current block; see `api`, and `clip` for whole clips."""

from longlive_jax.ops.windowed_attention.api import (
    CachedContext,
    windowed_attention,
    windowed_attention_lse,
)
from longlive_jax.ops.windowed_attention.clip import ClipContext, clip_attention

__all__ = ["CachedContext", "ClipContext", "clip_attention", "windowed_attention", "windowed_attention_lse"]
