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


FLUSHES = [
    # (window, sink, block), blocks, kept; slots after it and after each of three further blocks
    ((12, 3, 3), 6, 2, ["0 1 2 16 17", "0 1 2 16 17 18 19 20", "0 1 2 22 23 18 19 20 21"]),
    ((12, 3, 3), 2, 2, ["0 1 2 4 5", "0 1 2 4 5 6 7 8", "0 1 2 10 11 6 7 8 9"]),
    ((12, 3, 3), 1, 2, ["0 1 2", "0 1 2 3 4 5", "0 1 2 3 4 5 6 7 8"]),  # the sink holds the last frames
    ((12, 0, 3), 5, 2, ["13 14", "13 14 15 16 17", "13 14 15 16 17 18 19 20"]),
    ((9, 4, 3), 1, 2, ["0 1 2", "0 1 2 3 4 5", "0 1 2 3 8 7"]),  # the sink is not complete yet
    ((4, 1, 2), 4, 2, ["0 7", "0 9", "0 11"]),  # a ring of one frame
    ((6, 3, 3), 4, 2, ["0 1 2", "0 1 2", "0 1 2"]),  # no ring
    ((12, 3, 3), 6, 0, ["0 1 2", "0 1 2 18 19 20", "0 1 2 18 19 20 21 22 23"]),
]


@pytest.mark.parametrize(("geometry", "blocks", "kept", "slots"), FLUSHES)
def test_slots_after_a_flush(geometry, blocks, kept, slots):
    cache = cache_lib.flush(filled(WindowConfig(*geometry), blocks), jnp.ones(1, bool), frames=kept)
    block = geometry[2]
    for i, expected in enumerate(slots):
        if i:
            first = (blocks + i - 1) * block
            cache = cache_lib.write(cache, frames(first, block), first)
        length = int(cache.length[0])
        assert table(cache)[:length] == [int(position) for position in expected.split()]
        np.testing.assert_array_equal(cache.key, cache.value)  # both buffers moved alike


@pytest.mark.parametrize("geometry", [(12, 3, 3), (7, 2, 2), (9, 4, 3), (8, 0, 1), (13, 5, 4)])
def test_a_flushed_cache_holds_the_sink_and_all_since_as_far_as_the_window_reaches(geometry):
    window = WindowConfig(*geometry)
    block, sink, flushed_at = window.block_frames, window.sink_frames, 5 * window.block_frames
    cache = cache_lib.flush(filled(window, 5), jnp.ones(1, bool), frames=2)
    for first in range(flushed_at, flushed_at + 8 * block, block):
        length = int(cache.length[0])
        reach = max(flushed_at - 2, first - (window.window_frames - sink - block))
        assert sorted(table(cache)[:length]) == [*range(sink), *range(reach, first)]
        cache = cache_lib.write(cache, frames(first, block), first)


def test_only_the_chosen_samples_are_flushed():
    window = WindowConfig(12, 3, 3)
    cache = empty(window, batch=2)
    for first in range(0, 18, 3):
        cache = cache_lib.write(cache, frames(first, 3, batch=2), first)
    before = table(cache, 0)
    cache = cache_lib.flush(cache, jnp.asarray([False, True]), frames=2)
    assert (table(cache, 0), cache.length.tolist()) == (before, [9, 5])
    cache = cache_lib.write(cache, frames(18, 3, batch=2), 18)
    assert table(cache, 0) == [0, 1, 2, 15, 16, 17, 18, 19, 20]
    assert table(cache, 1)[:8] == [0, 1, 2, 16, 17, 18, 19, 20]


def test_the_relative_sink_sits_directly_before_what_a_flush_left():
    window = WindowConfig(9, 3, 3, "relative")
    cache = empty(window)
    key = jax.random.normal(jax.random.key(0), (2, 1, 3, 2, 1, 8))
    for first in range(0, 18, 3):
        cache = cache_lib.write(cache, BlockKV(key, key), first)
    cache = cache_lib.flush(cache, jnp.ones(1, bool), frames=2)
    for end, sink_at in ((21, 13), (22, 13), (23, 14), (30, 21)):  # 16, 17 | block; then the window slides
        moved = cache_lib.place_sink(cache, end)
        expected = rope.shift_frames(key, jnp.asarray([sink_at]))
        np.testing.assert_allclose(moved.key[:, :, :3], expected, atol=1e-5)


RESIZES = [
    # from, blocks, to; slots at once and after one more block
    ((12, 3, 3), 6, (9, 3, 3), "0 1 2 15 16 17", "0 1 2 18 19 20"),
    ((12, 3, 3), 6, (15, 3, 3), "0 1 2 12 13 14 15 16 17", "0 1 2 12 13 14 15 16 17 18 19 20"),
    ((12, 3, 3), 6, (12, 1, 3), "0 12 13 14 15 16 17", "0 20 13 14 15 16 17 18 19"),
    ((12, 3, 3), 2, (12, 1, 3), "0 1 2 3 4 5", "0 1 2 3 4 5 6 7 8"),  # nothing was evicted: all of it stays
    ((12, 3, 3), 1, (6, 0, 3), "0 1 2", "3 4 5"),
    ((12, 3, 3), 6, (6, 3, 3), "0 1 2", "0 1 2"),
]


@pytest.mark.parametrize(("before", "blocks", "after", "slots", "following"), RESIZES)
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_slots_after_a_change_of_window(before, blocks, after, slots, following, kind):
    window = WindowConfig(*after, kind)
    cache = cache_lib.resize(filled(WindowConfig(*before), blocks), window)
    assert cache.slots == window.cache_frames()
    for expected in (slots, following):
        in_use = table(cache)[: int(cache.length[0])]
        # A ring begins in its first slot, whatever lay there before.
        assert sorted(in_use) == sorted(int(position) for position in expected.split())
        cache = cache_lib.write(cache, frames(blocks * 3, 3), blocks * 3)


def test_a_change_between_the_rope_modes_keeps_the_sinks_own_positions():
    absolute, relative = WindowConfig(9, 3, 3), WindowConfig(9, 3, 3, "relative")
    cache = filled(relative, 5)
    turned = cache_lib.place_sink(cache, 18)
    assert np.abs(np.asarray(turned.key - cache.key)).max() > 0.1
    back = cache_lib.resize(turned, absolute)
    np.testing.assert_array_equal(back.key[:, :, :3], cache.sink_key)
    again = cache_lib.place_sink(cache_lib.resize(back, relative), 18)
    np.testing.assert_array_equal(again.key[:, :, :3], turned.key[:, :, :3])
    with pytest.raises(ValueError, match="a sink of 3 frames cannot become one of 4"):
        cache_lib.resize(back, WindowConfig(12, 4, 3))


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


@pytest.mark.parametrize(("sink", "count"), [(0, 9), (3, 9), (3, 3)])
def test_one_sample_is_written_as_one_of_several(sink, count):
    """A batch of one has a way of its own; more frames than there are slots drop the oldest."""
    window = WindowConfig(9, sink, 3)
    one, two = empty(window), empty(window, batch=2)
    for first in range(0, 4 * count, count):
        one = cache_lib.write(one, frames(first, count), first)
        two = cache_lib.write(two, frames(first, count, batch=2), first)
        np.testing.assert_array_equal(one.key[:, 0], two.key[:, 1])
        np.testing.assert_array_equal(one.value[:, 0], two.value[:, 1])
