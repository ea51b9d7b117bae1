"""The KV cache as explicit state: sink frames kept for ever, and a ring of the latest frames.

The cache holds what a block attends to *besides itself*: `window_frames - block_frames` slots of one
latent frame each. A block's own keys and values come with its pass and enter the cache when the
block is finished, overwriting the oldest frames in place. So nothing is ever moved, the slots in use
are always a prefix (attention does not care about their order), and a length is the only mask.

Frame i of a cache that started at frame 0 lives in slot i while i < sink_frames, and in slot
`sink + (i - sink) mod (slots - sink)` from then on. This holds for any window, sink and block. The ring
counts from `ring_start`, which is the frame after the sink until a `flush` or a `resize` drops frames
between the two.

Keys and values may be kept in 8 bits, sink and ring alike: a `Quantized` then stands where an array
stands otherwise, its leaves moved about by the same code. Attention makes them dense again, one layer at a
time.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from longlive_jax.config import CacheDType, TransformerConfig, WindowConfig
from longlive_jax.models import rope
from longlive_jax.ops.windowed_attention import CachedContext
from longlive_jax.quantize import numerics
from longlive_jax.quantize.numerics import Quantized
from longlive_jax.types import Array, pytree, static

_Frames = TypeVar("_Frames", bound=Array | Quantized)
"""Keys or values of frames, `[L, B, F, P, N, H]`, in either form."""


@pytree
class BlockKV:
    """Self-attention keys (rotated) and values of some frames, `[L, B, F, P, N, H]`.

    Those of a call are arrays. Those read from a cache are in its own form, a `Quantized` where that is of 8
    bits; nothing but the functions of this module sees these.
    """

    key: Array
    value: Array


@pytree
class KVCache:
    """Keys and values of the frames a block may look back at.

    Attributes:
      key: `[L, B, S, P, N, H]`, rotated at absolute frame positions (but see `sink_key`).
      value: `[L, B, S, P, N, H]`.
      sink_key: `[L, B, sink, P, N, H]`, the sink's keys at their own positions, kept only where rope is
        relative: there the sink travels with the window and is turned afresh from these for each block.
      start: int32 `[B]` position of the first frame in the cache, which is the first frame of the sink.
      ring_start: int32 `[B]` position of the first frame of the ring, in its first slot.
      end: int32 `[B]` position after the newest frame; `start == end` means empty.
      window: the geometry (static).
    """

    key: Array | Quantized
    value: Array | Quantized
    sink_key: Array | Quantized | None
    start: Array
    ring_start: Array
    end: Array
    window: WindowConfig = static()

    @property
    def slots(self) -> int:
        """S, frames the cache has room for."""
        return self.key.shape[2]

    @property
    def sink_slots(self) -> int:
        """Slots that are never overwritten; the others are the ring."""
        return min(self.window.sink_frames, self.slots)

    @property
    def ring_slots(self) -> int:
        """Slots that the latest frames take turns in."""
        return self.slots - self.sink_slots

    @property
    def length(self) -> Array:
        """int32 `[B]`, slots in use; always the first ones."""
        in_sink = jnp.minimum(self.end - self.start, self.sink_slots)
        return in_sink + jnp.clip(self.end - self.ring_start, 0, self.ring_slots)


def init(
    config: TransformerConfig,
    window: WindowConfig,
    *,
    batch: int,
    frame_len: int,
    dtype: jnp.dtype,
    total_frames: int | None = None,
    storage: CacheDType = "same",
) -> KVCache:
    """An empty cache.

    Args:
      config: the transformer's shape.
      window: window, sink and block.
      batch: B.
      frame_len: P, tokens of one latent frame.
      dtype: of keys and values.
      total_frames: length of the video; needed only where the window keeps everything.
      storage: whether they are kept in that or in 8 bits.

    Returns:
      A `KVCache` of `window.cache_frames(total_frames)` slots.
    """
    slots = window.cache_frames(total_frames)
    shape = (config.num_layers, batch, slots, frame_len, config.num_heads, config.head_dim)
    sink_shape = (*shape[:2], min(window.sink_frames, slots), *shape[3:])
    has_moving_sink = window.rope == "relative" and window.is_bounded and sink_shape[2] > 0

    def empty(shape: tuple[int, ...], *, centred: bool) -> Array | Quantized:
        if storage == "same":
            return jnp.zeros(shape, dtype)
        return numerics.empty_tokens(shape, storage, centred=centred)

    return KVCache(
        key=empty(shape, centred=True),
        value=empty(shape, centred=False),
        sink_key=empty(sink_shape, centred=True) if has_moving_sink else None,
        start=jnp.zeros(batch, jnp.int32),
        ring_start=jnp.full(batch, sink_shape[2], jnp.int32),
        end=jnp.zeros(batch, jnp.int32),
        window=window,
    )


def slot_of(cache: KVCache, positions: Array, *, end: Array) -> Array:
    """Where frames are stored once the newest frame is `end - 1`.

    Args:
      cache: gives the starts, the number of slots and of sink slots.
      positions: int32 `[B, F]`.
      end: int32 `[B]`.

    Returns:
      int32 `[B, F]` slots; S, one past the last, for frames that are not kept.
    """
    in_sink, in_ring = positions - cache.start[:, None], positions - cache.ring_start[:, None]
    is_sink = in_sink < cache.sink_slots
    is_ring = (in_ring >= 0) & (positions >= end[:, None] - cache.ring_slots)
    slot = jnp.where(is_sink, in_sink, cache.sink_slots + in_ring % max(cache.ring_slots, 1))
    return jnp.where(is_sink | is_ring, slot, cache.slots)


def write(cache: KVCache, own: BlockKV, first: Array) -> KVCache:
    """Stores the frames of a finished pass, overwriting the oldest ones in place.

    Args:
      cache: the cache; donate it to keep the write in place.
      own: keys and values `[L, B, F, P, N, H]` of F frames.
      first: int32 scalar, position of the first of them. An empty cache starts here.

    Returns:
      The cache with `end = first + F`.
    """
    frames = own.key.shape[2]
    first = jnp.broadcast_to(jnp.asarray(first, jnp.int32), cache.end.shape)
    is_empty = cache.start == cache.end
    cache = dataclasses.replace(
        cache,
        start=jnp.where(is_empty, first, cache.start),
        ring_start=jnp.where(is_empty, first + cache.sink_slots, cache.ring_start),
    )
    end = first + frames
    slots = slot_of(cache, first[:, None] + jnp.arange(frames), end=end)
    sink_key = cache.sink_key
    if sink_key is not None:
        in_sink = jnp.where(slots < cache.sink_slots, slots, cache.sink_slots)
        sink_key = _store(sink_key, _in_form_of(sink_key, own.key), in_sink)
    return dataclasses.replace(
        cache,
        key=_store(cache.key, _in_form_of(cache.key, own.key), slots),
        value=_store(cache.value, _in_form_of(cache.value, own.value), slots),
        sink_key=sink_key,
        end=end,
    )


def restart(cache: KVCache, first: Array) -> KVCache:
    """Empties the cache; its next frame, the first of a new sink, is at position `first`."""
    first = jnp.broadcast_to(jnp.asarray(first, jnp.int32), cache.end.shape)
    # Two buffers: one buffer in two places could not be donated.
    return dataclasses.replace(cache, start=first, ring_start=first + cache.sink_slots, end=jnp.copy(first))


def flush(cache: KVCache, mask: Array, *, frames: int) -> KVCache:
    """Forgets all but the sink and the latest frames; a copy of `frames` slots, no pass of the model.

    What stays of the ring moves to its front, so that the slots in use are a prefix again. Frames that
    are part of the sink count as kept. With relative rope the sink then sits directly before them.

    Args:
      cache: the cache; donate it to keep the move in place.
      mask: bool `[B]`, which samples forget.
      frames: how many of the latest frames stay, at most the ring.

    Source: Infinity-RoPE (arXiv 2511.20649), KV flush.
    """
    kept = min(frames, cache.ring_slots)
    ring_start = jnp.maximum(cache.ring_start, cache.end - kept)
    positions = ring_start[:, None] + jnp.arange(kept)  # [B, kept]
    is_kept = (positions < cache.end[:, None]) & mask[:, None]
    to = jnp.where(is_kept, cache.sink_slots + jnp.arange(kept), cache.slots)
    moved = frames_at(cache, positions)
    return dataclasses.replace(
        cache,
        key=_store(cache.key, moved.key, to),
        value=_store(cache.value, moved.value, to),
        ring_start=jnp.where(mask, ring_start, cache.ring_start),
    )


def resize(cache: KVCache, window: WindowConfig) -> KVCache:
    """A cache of another geometry with the frames of this one: the sink, and the latest that fit.

    A larger ring is not full at first: frames that were evicted do not come back.

    Args:
      cache: a cache of a bounded window.
      window: the new geometry, bounded too. Its sink must not be longer than the old one.
    """
    sink, slots = min(window.sink_frames, window.cache_frames()), window.cache_frames()
    if sink > cache.sink_slots:
        raise ValueError(f"a sink of {cache.sink_slots} frames cannot become one of {sink}")
    # The ring's frames, and those before it as long as nothing lies between.
    oldest = jnp.maximum(cache.ring_start, cache.end - cache.ring_slots)
    oldest = jnp.where(oldest <= cache.start + cache.sink_slots, cache.start + sink, oldest)
    ring_start = jnp.maximum(oldest, cache.end - (slots - sink))
    positions = jnp.concatenate(
        [cache.start[:, None] + jnp.arange(sink), ring_start[:, None] + jnp.arange(slots - sink)], axis=1
    )
    moved = frames_at(cache, positions)
    sink_key = _leading(cache.key if cache.sink_key is None else cache.sink_key, sink)

    def joined(sink_part: Array, part: Array) -> Array:
        return jnp.concatenate([sink_part, part[:, :, sink:]], axis=2)

    return KVCache(
        key=jax.tree.map(joined, sink_key, moved.key),
        value=moved.value,
        sink_key=jax.tree.map(jnp.copy, sink_key) if window.rope == "relative" and sink > 0 else None,
        start=cache.start,
        ring_start=ring_start,
        end=cache.end,
        window=window,
    )


def frames_at(cache: KVCache, positions: Array) -> BlockKV:
    """Keys and values of the frames at `positions` `[B, F]`; what is not in the cache makes no sense."""
    slots = jnp.minimum(slot_of(cache, positions, end=cache.end), max(cache.slots - 1, 0))
    where = slots[None, :, :, None, None, None]

    def take(buffer: Array) -> Array:
        return jnp.take_along_axis(buffer, where, axis=2)

    return BlockKV(jax.tree.map(take, cache.key), jax.tree.map(take, cache.value))


def place_sink(cache: KVCache, end: Array) -> KVCache:
    """Turns the sink's keys to where relative rope wants them for a window that ends at `end`.

    While the window fills, frames keep their own positions. Once it is full the sink sits directly in
    front of the latest frames: it follows the window instead of falling behind. Rotations only see
    differences, so nothing but the sink has to move. With absolute rope this does nothing. It is also
    directly in front of what a `flush` has left.

    Args:
      cache: the cache.
      end: int32 scalar or `[B]`, position after the last frame of the window.
    """
    if cache.sink_key is None:
        return cache
    before_ring = cache.ring_start - cache.sink_slots
    behind = jnp.maximum(end - cache.window.window_frames, before_ring) - cache.start
    if isinstance(cache.sink_key, Quantized):
        # From the keys as they were written, so that the rounding of one block is gone in the next.
        turned = rope.shift_frames(cache.sink_key.dense(jnp.float32), behind)
        moved: Array | Quantized = _in_form_of(cache.key, turned)
    else:
        moved = rope.shift_frames(cache.sink_key, behind)

    def put(buffer: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, 0, axis=2)

    return dataclasses.replace(cache, key=jax.tree.map(put, cache.key, moved))


def context(cache: KVCache) -> CachedContext | None:
    """The whole cache as attention context; None if it has no slots."""
    return _context(cache, cache.slots, cache.length)


def sink_context(cache: KVCache) -> CachedContext | None:
    """The sink alone as attention context; None if there is no sink."""
    return _context(cache, cache.sink_slots, jnp.minimum(cache.length, cache.sink_slots))


def in_order(cache: KVCache) -> BlockKV:
    """The frames of a full cache, the sink first and then the ring in order of time.

    Returns:
      Keys and values `[L, B, S, P, N, H]`. Slots not yet in use make no sense here: wait until
      `length` is `slots`.
    """
    sink, ring = jnp.arange(cache.sink_slots), jnp.arange(cache.ring_slots)
    latest = cache.end[:, None] - len(ring) + ring
    return frames_at(cache, jnp.concatenate([cache.start[:, None] + sink, latest], axis=1))


def place(timeline: BlockKV, frames: BlockKV, at: Array) -> BlockKV:
    """Writes keys and values of some frames over those of a longer stretch, from its frame `at` on."""

    def one(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(into, new.astype(into.dtype), at, axis=2)

    return jax.tree.map(one, timeline, frames)


def select(mask: Array, new: KVCache, old: KVCache) -> KVCache:
    """Takes `new` for the samples where `mask` `[B]` holds and `old` for the others."""

    def pick(a: Array, b: Array) -> Array:
        axis = 1 if a.ndim > 1 else 0
        shape = [1] * a.ndim
        shape[axis] = mask.shape[0]
        return jnp.where(mask.reshape(shape), a, b)

    return jax.tree.map(pick, new, old)


def _context(cache: KVCache, slots: int, length: Array) -> CachedContext | None:
    if slots == 0:
        return None
    layers, batch, _, frame_len, heads, head_dim = cache.key.shape

    def tokens(x: Array | Quantized) -> Array | Quantized:
        if isinstance(x, Quantized):  # its frames stay apart: they have a centre each
            return _leading(x, slots)
        return x[:, :, :slots].reshape(layers, batch, slots * frame_len, heads, head_dim)

    return CachedContext(tokens(cache.key), tokens(cache.value), length * frame_len)


def _leading(frames: _Frames, count: int) -> _Frames:
    """The first `count` frames."""
    return jax.tree.map(lambda x: x[:, :, :count], frames)


def _in_form_of(buffer: Array | Quantized, new: Array | Quantized) -> Array | Quantized:
    """Frames in the form that a buffer stores them in."""
    if isinstance(buffer, Quantized) and not isinstance(new, Quantized):
        kind = numerics.kind_of(buffer.values)
        if kind is None:
            raise ValueError(f"a cache of {buffer.values.dtype} is not one of 8 bits")
        return numerics.quantize_tokens(new, kind, centred=buffer.centre is not None)
    return new


def _store(buffer: _Frames, new: _Frames, slots: Array) -> _Frames:
    """Writes frames `[L, B, F, ...]` to `slots` `[B, F]` of `[L, B, S, ...]`; slot S drops the frame."""
    return jax.tree.map(lambda into, frames: _scatter(into, frames, slots), buffer, new)


def _scatter(buffer: Array, new: Array, slots: Array) -> Array:
    if buffer.shape[2] == 0:
        return buffer
    new = new.astype(buffer.dtype)
    if buffer.shape[1] == 1:
        return _put_each(buffer, new, slots[0])

    # Spelled out: under vmap the scatter copies a transposed buffer, and indexed on both axes it gathers
    # the new frames from all devices of a batch that is spread over several.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 3, 4, 5),
        inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(2,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        buffer,
        slots[..., None],
        new,
        numbers,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _put_each(buffer: Array, new: Array, slots: Array) -> Array:
    """`_scatter` of a batch of one, frame by frame: updates in place, where a GPU's scatter goes element by
    element. A frame that is dropped writes back what it finds."""
    for i in range(new.shape[2]):
        frame = new[:, :, i : i + 1]
        old = jax.lax.dynamic_slice_in_dim(buffer, slots[i], 1, axis=2)
        kept = jnp.where(slots[i] < buffer.shape[2], frame, old)
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, kept, slots[i], axis=2)
    return buffer
