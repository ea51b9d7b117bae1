"""The recache at a prompt switch inside a rollout, at a frame that is only known when it runs.

The latest latents go through the model once under the new prompt and take the place of everything
in the cache. At inference these are at most a window's worth; in training they are the whole history
(21 frames), more than a window of 12. Of those, keys and values are only ever attended to where they
are in the sink or in the window: the oldest `sink` frames, which become the new sink, and the latest
`window - sink`. Nothing depends on the frames between, in any layer, so they are left out: the pass
runs over sink and window at their own positions, densely, and gives what the pass over all would.

How many frames there are to recache is a shape, so each possible count is a branch of a
`lax.switch`: all counts up to the window in the clip that opens a sequence, one in later clips.

Source: LongLive `pipeline/streaming_switch_training.py` (v1.0). There a sink that is zeroed at a
switch after frame 21 stays zero, and attended to; here it is rebuilt.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from longlive_jax import cache as cache_lib
from longlive_jax.cache import BlockKV, CachedContext, KVCache
from longlive_jax.types import Array

ContextPass = Callable[[Array, Array, CachedContext | None], BlockKV]
"""Keys and values under the new prompt: `(latents [B, F, h, w, C], positions [F], context)`."""


def rebuild_after_switch(
    context_pass: ContextPass,
    cache: KVCache,
    timeline: BlockKV | None,
    *,
    history: Array,
    frame: Array,
    at: Array,
    switches: Array,
    opening: bool,
    keep_sink: bool,
) -> tuple[KVCache, BlockKV | None]:
    """Rebuilds the cache if the block at `frame` is the first under the new prompt.

    Args:
      context_pass: keys and values of clean latents under the new prompt.
      cache: of a bounded window.
      timeline: `[L, B, A + F, P, N, H]` keys and values of the clip so far, rewritten alike, or None.
      history: `[B, R, h, w, C]`, latents before `frame`, newest last; R is at least the window.
      frame: int32 scalar.
      at: int32 scalar, timeline frame of `frame`.
      switches: bool scalar.
      opening: whether the clip is the first of its sequence; if not, `frame` is at least the window.
      keep_sink: leave the sink alone where the window no longer reaches back to it.

    Returns:
      The cache and the timeline, as they were if nothing switches.
    """
    window = cache.window
    smaller = range(0, window.window_frames, window.block_frames) if opening else ()
    operands = (cache, timeline, history, frame, at)
    branches: list[Callable[..., tuple[KVCache, BlockKV | None]]] = [_unchanged]
    branches += [functools.partial(_rewritten, context_pass, count) for count in smaller]
    branches += [functools.partial(_rewritten, context_pass, window.window_frames)]
    index = len(branches) - 1 - jnp.maximum(-(-(window.window_frames - frame) // window.block_frames), 0)
    if keep_sink:
        branches += [functools.partial(_beside_old_sink, context_pass)]
        index = jnp.where(frame > window.window_frames, len(branches) - 1, index)
    return jax.lax.switch(jnp.where(switches, index, 0), branches, *operands)


def _unchanged(
    cache: KVCache, timeline: BlockKV | None, history: Array, frame: Array, at: Array
) -> tuple[KVCache, BlockKV | None]:
    return cache, timeline


def _rewritten(
    context_pass: ContextPass,
    count: int,
    cache: KVCache,
    timeline: BlockKV | None,
    history: Array,
    frame: Array,
    at: Array,
) -> tuple[KVCache, BlockKV | None]:
    """Sink and window anew: `count` frames, the oldest of them the new sink."""
    if count == 0:
        return cache, timeline
    sink = min(cache.sink_slots, count)
    local = count - sink
    reach = jnp.minimum(frame, history.shape[1])
    oldest = jax.lax.dynamic_slice_in_dim(history, history.shape[1] - reach, sink, axis=1)
    latents = jnp.concatenate([oldest, history[:, history.shape[1] - local :]], axis=1)
    positions = jnp.concatenate([frame - reach + jnp.arange(sink), frame - local + jnp.arange(local)])
    own = context_pass(latents, positions, None)
    cache = cache_lib.restart(cache, frame - reach)
    if sink:
        cache = cache_lib.write(cache, _frames(own, 0, sink), frame - reach)
        timeline = timeline and cache_lib.place(timeline, _frames(own, 0, sink), jnp.int32(0))
    if local:
        cache = cache_lib.write(cache, _frames(own, sink, count), frame - local)
        timeline = _latest_placed(cache, timeline, _frames(own, sink, count), at)
    return cache, timeline


def _beside_old_sink(
    context_pass: ContextPass,
    cache: KVCache,
    timeline: BlockKV | None,
    history: Array,
    frame: Array,
    at: Array,
) -> tuple[KVCache, BlockKV | None]:
    """The window anew, attending to the sink as it is."""
    local = cache.window.window_frames - cache.sink_slots
    positions = frame - local + jnp.arange(local)
    latents = history[:, history.shape[1] - local :]
    own = context_pass(latents, positions, cache_lib.sink_context(cache))
    return cache_lib.write(cache, own, frame - local), _latest_placed(cache, timeline, own, at)


def _latest_placed(cache: KVCache, timeline: BlockKV | None, own: BlockKV, at: Array) -> BlockKV | None:
    """The frames that the ring keeps, placed directly before timeline frame `at`."""
    frames = own.key.shape[2]
    ring = min(frames, cache.slots - cache.sink_slots)
    return timeline and cache_lib.place(timeline, _frames(own, frames - ring, frames), at - ring)


def _frames(own: BlockKV, start: int, stop: int) -> BlockKV:
    return jax.tree.map(lambda x: x[:, :, start:stop], own)
