"""Dense attention over a cached context and the current block; see `api`."""

from longlive_jax.ops.windowed_attention.api import CachedContext, windowed_attention

__all__ = ["CachedContext", "windowed_attention"]
