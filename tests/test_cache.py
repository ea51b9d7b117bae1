"""The cache as literal slot tables: which frame lies where, for sinks, wrap-around and recaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import cache as cache_lib
from longlive_jax.cache import BlockKV
from longlive_jax.config import TransformerConfig, WindowConfig
from longlive_jax.errors import UserError
from longlive_jax.models import rope

CONFIG = TransformerConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=2)


def empty(window: WindowConfig, batch: int = 1, total_frames: int | None = None) -> cache_lib.KVCache:
    return cache_lib.init(
        CONFIG, window, batch=batch, frame_len=2, dtype=jnp.float32, total_frames=total_frames
    )


def frames(first: int, count: int, batch: int = 1) -> BlockKV:
    """Keys and values that spell their frame's position plus one (so that 0 means empty)."""
    position = jnp.arange(first, first + count, dtype=jnp.float32) + 1
    filled = jnp.broadcast_to(position[None, None, :, None, None, None], (2, batch, count, 2, 1, 8))
    return BlockKV(filled, filled)


def table(cache: cache_lib.KVCache, sample: int = 0) -> list[int | None]:
    """Position of the frame in each slot, None where nothing was written."""
    spelled = np.asarray(cache.value[0, sample, :, 0, 0, 0]) - 1
    return [None if position < 0 else int(position) for position in spelled]


def filled(window: WindowConfig, blocks: int) -> cache_lib.KVCache:
    cache = empty(window, total_frames=blocks * window.block_frames)
    for block in range(blocks):
        cache = cache_lib.write(
            cache, frames(block * window.block_frames, window.block_frames), block * window.block_frames
        )
    return cache


TABLES = [
    # (window, sink, block), blocks, slots, length
    ((12, 3, 3), 1, [0, 1, 2, None, None, None, None, None, None], 3),
    ((12, 3, 3), 3, [0, 1, 2, 3, 4, 5, 6, 7, 8], 9),
    ((12, 3, 3), 4, [0, 1, 2, 9, 10, 11, 6, 7, 8], 9),
    ((12, 3, 3), 5, [0, 1, 2, 9, 10, 11, 12, 13, 14], 9),
    ((6, 0, 3), 3, [6, 7, 8], 3),
    ((4, 1, 2), 2, [0, 3], 2),  # a ring of one frame under blocks of two
    ((4, 1, 2), 3, [0, 5], 2),
    ((4, 1, 3), 3, [0], 1),  # nothing but the sink
    ((7, 2, 2), 3, [0, 1, 5, 3, 4], 5),  # sink 2, ring 3: block and ring do not divide
    ((8, 3, 1), 5, [0, 1, 2, 3, 4, None, None], 5),
    ((9, 4, 3), 2, [0, 1, 2, 3, 4, 5], 6),  # the sink ends inside a block
    ((9, 4, 3), 3, [0, 1, 2, 3, 8, 7], 6),
    ((3, 0, 3), 2, [], 0),
    ((-1, 0, 3), 4, [9, 10, 11, 3, 4, 5, 6, 7, 8], 9),  # the last block of the video is never looked back at
]


@pytest.mark.parametrize(("geometry", "blocks", "slots", "length"), TABLES)
def test_slots_after_streaming(geometry, blocks, slots, length):
    cache = filled(WindowConfig(*geometry), blocks)
    assert table(cache) == slots
    assert int(cache.length[0]) == length


@pytest.mark.parametrize("geometry", [(12, 3, 3), (7, 2, 2), (4, 1, 2), (9, 4, 3), (8, 0, 1), (13, 5, 4)])
def test_a_block_always_sees_the_sink_and_the_latest_frames(geometry):
    """The attended set is exactly what the release attends to, at every block."""
    window = WindowConfig(*geometry)
    cache, block = empty(window), window.block_frames
    for first in range(0, 10 * block, block):
        length = int(cache.length[0])
        seen = set(table(cache)[:length])
        latest = window.window_frames - window.sink_frames - block
        expected = {p for p in range(first) if p < window.sink_frames or p >= first - latest}
        assert seen == expected
        cache = cache_lib.write(cache, frames(first, block), first)


def test_slots_in_use_are_always_a_prefix():
    window = WindowConfig(7, 2, 2)
    for blocks in range(6):
        cache = filled(window, blocks)
        used = [p is not None for p in table(cache)]
        assert used == sorted(used, reverse=True)
        assert sum(used) == int(cache.length[0])


def test_recache_with_a_kept_sink_rewrites_the_ring_only():
    cache = filled(WindowConfig(12, 3, 3), 6)
    again = cache_lib.write(cache, frames(109, 9), 9)  # frames 9..17 with new content
    assert table(again) == [0, 1, 2, 115, 116, 117, 112, 113, 114]
    assert (int(again.start[0]), int(again.end[0])) == (0, 18)


def test_recache_without_a_kept_sink_makes_the_oldest_frames_the_sink():
    cache = filled(WindowConfig(12, 3, 3), 6)
    again = cache_lib.write(cache_lib.restart(cache, 6), frames(6, 12), 6)
    assert table(again) == [6, 7, 8, 15, 16, 17, 12, 13, 14]
    following = cache_lib.write(again, frames(18, 3), 18)
    assert table(following) == [6, 7, 8, 15, 16, 17, 18, 19, 20]


def test_restart_empties_and_the_next_block_becomes_the_sink():
    cache = cache_lib.restart(filled(WindowConfig(12, 3, 3), 6), 18)
    assert int(cache.length[0]) == 0
    cache = cache_lib.write(cache, frames(18, 3), 18)
    assert table(cache)[:3] == [18, 19, 20]
    assert int(cache.length[0]) == 3


def test_samples_of_a_batch_may_have_started_at_different_frames():
    window = WindowConfig(12, 3, 3)
    cache = empty(window, batch=2)
    for first in (0, 3, 6):
        cache = cache_lib.write(cache, frames(first, 3, batch=2), first)
    cleared = cache_lib.restart(cache, 9)
    cache = cache_lib.select(jnp.asarray([False, True]), cleared, cache)
    for first in (9, 12):
        cache = cache_lib.write(cache, frames(first, 3, batch=2), first)
    assert table(cache, 0) == [0, 1, 2, 9, 10, 11, 12, 13, 14]
    assert table(cache, 1)[:6] == [9, 10, 11, 12, 13, 14]
    assert cache.length.tolist() == [9, 6]


def test_the_relative_sink_follows_the_window():
    """Once full, the sink's keys are those of the frames directly in front of the latest ones."""
    window = WindowConfig(6, 3, 3, "relative")
    cache = empty(window)
    key = jax.random.normal(jax.random.key(0), (2, 1, 3, 2, 1, 8))
    cache = cache_lib.write(cache, BlockKV(key, key), 0)
    np.testing.assert_allclose(cache_lib.place_sink(cache, 6).key, cache.key, atol=1e-6)
    moved = cache_lib.place_sink(cache_lib.place_sink(cache, 900), 9)
    np.testing.assert_allclose(moved.key[:, :, :3], rope.shift_frames(key, jnp.asarray([3])), atol=1e-5)
    np.testing.assert_array_equal(moved.value, cache.value)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((5, 3, 3), r"window_frames=5 must be at least sink_frames \+ block_frames = 6"),
        ((12, -1, 3), "sink_frames=-1"),
        ((12, 3, 0), "block_frames=0"),
        ((0, 0, 1), "window_frames=0"),
    ],
)
def test_geometries_that_make_no_sense_are_refused(geometry, words):
    with pytest.raises(UserError, match=words):
        WindowConfig(*geometry)


def test_an_unbounded_window_needs_the_length_of_the_video():
    with pytest.raises(UserError, match="give the number of frames"):
        empty(WindowConfig(-1, 0, 3))
