"""What each block of a clip looks back at, and the timeline its keys and values are laid out on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import cache as cache_lib
from longlive_jax.cache import BlockKV
from longlive_jax.config import PRESETS, WindowConfig
from longlive_jax.ops.windowed_attention import ClipContext, clip_attention, reference
from longlive_jax.ops.windowed_attention.clip import visible_frames

RELEASED = WindowConfig(window_frames=12, sink_frames=3, block_frames=3)


def seen(window, start):
    return [frame for part in visible_frames(window, start) for frame in range(100)[part]]


@pytest.mark.parametrize(
    ("window", "start", "expected"),
    [
        (RELEASED, 0, []),
        (RELEASED, 3, [0, 1, 2]),
        (RELEASED, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (RELEASED, 12, [0, 1, 2, 6, 7, 8, 9, 10, 11]),
        (RELEASED, 18, [0, 1, 2, 12, 13, 14, 15, 16, 17]),
        (WindowConfig(6, 3, 3), 9, [0, 1, 2]),
        (WindowConfig(6, 0, 3), 9, [6, 7, 8]),
        (WindowConfig(6, 3, 1), 2, [0, 1]),
        (WindowConfig(5, 1, 2), 8, [0, 6, 7]),
        (WindowConfig(-1, 3, 3), 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_visible_frames(window, start, expected):
    assert seen(window, start) == expected


def random(seed, frames, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, frames, 4, 2, 8))  # [B, F, P, N, H]


@pytest.mark.parametrize("past", [0, 3])
def test_each_block_attends_to_its_own_frames_and_those_it_sees(past):
    window = WindowConfig(5, 1, 2)
    query, key, value = (random(i, 6) for i in range(3))
    kept_key, kept_value = (random(i, past + 6) for i in (3, 4))
    out = clip_attention(query, key, value, ClipContext(kept_key, kept_value, None, window))
    for start in range(0, 6, 2):
        own = slice(start, start + 2)
        frames = np.asarray(seen(window, past + start), int)
        expected = reference.attend(
            tokens(query[:, own]),
            tokens(jnp.concatenate([kept_key[:, frames], key[:, own]], axis=1)),
            tokens(jnp.concatenate([kept_value[:, frames], value[:, own]], axis=1)),
        )
        np.testing.assert_allclose(tokens(out[:, own]), expected, rtol=1e-6, atol=1e-6)


def tokens(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def test_straight_through_uses_kept_values_and_sends_the_gradient_to_the_own_ones():
    window = WindowConfig(4, 0, 2)
    query, key, value = (random(i, 4) for i in range(3))
    kept_key, kept_value = (random(i, 4) for i in (3, 4))

    def last_block(key, value, through):
        context = ClipContext(kept_key, kept_value, through, window)
        return clip_attention(query, key, value, context)[:, 2:].sum()

    both = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    one = both.at[1].set(0.0)
    for through in (None, both, one):
        np.testing.assert_array_equal(last_block(key, value, through), last_block(key, value, None))
        gradient = jax.grad(last_block, argnums=1)(key, value, through)
        reached = np.abs(gradient).max(axis=(0, 2, 3, 4)) > 0
        assert reached.tolist() == [through is not None, through is both, True, True]

    def by_kept(kept_value):
        context = ClipContext(kept_key, kept_value, None, window)
        return clip_attention(query, key, value, context)[:, 2:].sum()

    gradient = jax.grad(last_block, argnums=1)(key, value, both)
    np.testing.assert_allclose(gradient[:, :2], jax.grad(by_kept)(kept_value)[:, :2], rtol=1e-5)


def labelled(positions):
    """Keys and values that hold their own position."""
    value = jnp.broadcast_to(
        jnp.asarray(positions, jnp.float32)[None, None, :, None, None, None], (2, 1, len(positions), 1, 4, 16)
    )
    return BlockKV(value, -value)


def test_in_order_undoes_the_ring():
    cache = cache_lib.init(PRESETS["tiny"].transformer, RELEASED, batch=1, frame_len=1, dtype=jnp.float32)
    for start in range(0, 24, 3):
        cache = cache_lib.write(cache, labelled(range(start, start + 3)), jnp.int32(start))
        if start >= 6:
            latest = range(start + 3 - 6, start + 3)
            frames = cache_lib.in_order(cache)
            assert frames.key[0, 0, :, 0, 0, 0].tolist() == [0, 1, 2, *latest]
            np.testing.assert_array_equal(frames.value, -frames.key)


def test_in_order_after_a_sink_that_is_not_next_to_the_window():
    cache = cache_lib.init(PRESETS["tiny"].transformer, RELEASED, batch=1, frame_len=1, dtype=jnp.float32)
    cache = cache_lib.restart(dataclasses.replace(cache, end=jnp.full(1, 30, jnp.int32)), jnp.int32(9))
    cache = cache_lib.write(cache, labelled([9, 10, 11]), jnp.int32(9))
    cache = cache_lib.write(cache, labelled(range(21, 30)), jnp.int32(21))
    assert int(cache.length[0]) == 9
    assert cache_lib.in_order(cache).key[0, 0, :, 0, 0, 0].tolist() == [9, 10, 11, *range(24, 30)]
