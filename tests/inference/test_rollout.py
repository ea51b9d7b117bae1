"""What a rollout promises: scan = stream, ring = dense attention, samples independent of their batch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import SamplerConfig, TransformerConfig, WindowConfig
from longlive_jax.inference import rollout
from longlive_jax.models.transformer import Transformer, init_params
from tests.programs import compiled

CONFIG = TransformerConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=8, text_len=4, latent_channels=4
)
MODEL = Transformer(CONFIG)
SIZE = (4, 4)
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def generator(window=12, sink=3, block=3, rope="absolute", steps=(1000, 500)):
    return rollout.Generator(MODEL, WindowConfig(window, sink, block, rope), SamplerConfig(steps=steps))


def prompts(batch, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, 4, 8))


def begin(gen, params, text, seeds, total_frames=None):
    seeds = np.asarray(seeds, np.uint32)
    return rollout.init(gen, params, text, seeds, latent_size=SIZE, total_frames=total_frames)


def stream(gen, params, state, blocks):
    latents = []
    for _ in range(blocks):
        state, block = rollout.step(gen, params, state)
        latents.append(np.asarray(block))
    return state, np.concatenate(latents, axis=1)


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_scan_and_stream_agree(params, rope):
    """To float rounding: the scan compiles the step into its own loop."""
    gen = generator(rope=rope)
    _, streamed = stream(gen, params, begin(gen, params, prompts(2), [1, 2]), 7)
    _, scanned = rollout.rollout(gen, params, begin(gen, params, prompts(2), [1, 2]), 7)
    np.testing.assert_allclose(scanned, streamed, **ROUNDING)


def test_two_streams_and_a_resumed_one_agree_bit_for_bit(params):
    """The same compiled step from the same state: no difference at all, also after a round trip."""
    gen = generator()
    _, whole = stream(gen, params, begin(gen, params, prompts(1), [5]), 6)
    state, first = stream(gen, params, begin(gen, params, prompts(1), [5]), 3)
    saved = jax.tree.map(np.asarray, state)
    _, second = stream(gen, params, jax.tree.map(jnp.asarray, saved), 3)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)


@pytest.mark.parametrize("geometry", [(21, 3, 3), (21, 0, 3), (14, 5, 3), (-1, 3, 3)])
def test_nothing_differs_while_nothing_is_evicted(params, geometry):
    """Any window that still holds every frame gives the video of the unbounded one."""
    unbounded, bounded = generator(-1, 0, 3), generator(*geometry)
    _, expected = stream(unbounded, params, begin(unbounded, params, prompts(1), [3], 12), 4)
    _, latents = stream(bounded, params, begin(bounded, params, prompts(1), [3], 12), 4)
    np.testing.assert_allclose(latents, expected, **ROUNDING)


def test_the_order_of_the_ring_does_not_matter(params):
    """A block after many evictions, against the same pass over the same frames in another order."""
    gen = generator(9, 3, 3)
    state, _ = stream(gen, params, begin(gen, params, prompts(1), [3]), 7)
    noisy = jax.random.normal(jax.random.key(9), (1, 3, *SIZE, 4))
    positions = state.frame + jnp.arange(3)
    context = rollout.cache_lib.context(state.cache)
    velocity, _ = gen.velocity(params, noisy, jnp.float32(700), state.text, positions, context)
    # 21 frames behind: the ring's three slots hold 18, 19, 20 from slot 3 + (18 - 3) % 3 on.
    order = [0, 1, 2] + [3 + (i - 3) % 3 for i in (18, 19, 20)]
    frame_len = state.cache.key.shape[3]
    reversed_ = dataclasses.replace(
        context,
        key=_reorder(context.key, order[::-1], frame_len),
        value=_reorder(context.value, order[::-1], frame_len),
    )
    again, _ = gen.velocity(params, noisy, jnp.float32(700), state.text, positions, reversed_)
    np.testing.assert_allclose(velocity, again, **ROUNDING)


def _reorder(x, order, frame_len):
    frames = x.reshape(*x.shape[:2], -1, frame_len, *x.shape[3:])
    return frames[:, :, jnp.asarray(order)].reshape(x.shape)


def test_a_sample_does_not_depend_on_its_batch_or_the_number_of_steps_around_it(params):
    gen = generator()
    text = prompts(3)
    _, together = stream(gen, params, begin(gen, params, text, [4, 9, 2]), 4)
    for row, seed in enumerate((4, 9, 2)):
        _, alone = stream(gen, params, begin(gen, params, text[row : row + 1], [seed]), 4)
        np.testing.assert_allclose(together[row], alone[0], **ROUNDING)


def test_a_batch_spread_over_eight_devices_gives_the_same_videos(params):
    gen, text, seeds = generator(), prompts(8), np.arange(8, dtype=np.uint32)
    _, expected = rollout.rollout(gen, params, begin(gen, params, text, seeds), 5)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.device_put(params, everywhere)
    state = begin(gen, spread, jax.device_put(text, rows), seeds)
    program = rollout.rollout.lower(gen, spread, state, 5).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program)
    state, latents = rollout.rollout(gen, spread, state, 5)
    assert len(latents.sharding.device_set) == 8
    np.testing.assert_allclose(latents, expected, **ROUNDING)


def test_prompt_schedules_may_differ_within_a_batch(params):
    """Each sample equals the same sample alone under its own switches."""
    gen, first, second = generator(9, 3, 3), prompts(3, 0), prompts(3, 1)
    plan = {6: ("keep", 0), 9: ("clear", 1), 15: ("recache", 2), 18: ("recache", 1)}

    def play(rows):
        state = begin(gen, params, first[jnp.asarray(rows)], rows)
        latents = []
        for frame in range(0, 27, 3):
            if frame in plan and plan[frame][1] in rows:
                policy, sample = plan[frame]
                mask = np.asarray([row == sample for row in rows])
                new = second[jnp.asarray(rows)]
                if policy == "recache":
                    generated = frame - int(np.asarray(state.cache.start)[rows.index(sample)])
                    state = rollout.recache(
                        gen,
                        params,
                        state,
                        new,
                        mask,
                        frames=gen.recache_frames(generated),
                        keep_sink=gen.keeps_sink(generated, True),
                    )
                else:
                    state = getattr(rollout, policy)(gen, params, state, new, mask)
            state, block = rollout.step(gen, params, state)
            latents.append(block)
        return np.concatenate(latents, axis=1)

    together = play([0, 1, 2])
    for row in range(3):
        np.testing.assert_allclose(together[row], play([row])[0], **ROUNDING)


def test_clear_starts_over_as_a_new_video_at_a_later_position(params):
    gen, text = generator(9, 3, 3), prompts(2)
    state, _ = stream(gen, params, begin(gen, params, text[:1], [8]), 4)
    state = rollout.clear(gen, params, state, text[1:], np.ones(1, bool))
    _, after = stream(gen, params, state, 3)
    fresh = begin(gen, params, text[1:], [8])
    fresh = dataclasses.replace(fresh, frame=jnp.int32(12))
    _, expected = stream(gen, params, fresh, 3)
    np.testing.assert_allclose(after, expected, **ROUNDING)


def test_recaching_under_the_same_prompt_while_all_is_in_view_changes_little_and_switching_does(params):
    """Dense recache differs from the causal cache, but far less than another prompt does."""
    gen, text = generator(), prompts(2)
    mask = np.ones(1, bool)

    def after(new):
        state, _ = stream(gen, params, begin(gen, params, text[:1], [8]), 3)
        if new is not None:
            state = rollout.recache(gen, params, state, new, mask, frames=9, keep_sink=False)
        return stream(gen, params, state, 1)[1]

    plain, same, other = after(None), after(text[:1]), after(text[1:])
    assert 0 < np.abs(same - plain).mean() < 0.5 * np.abs(other - plain).mean()


def test_a_kept_sink_survives_the_recache_and_a_dropped_one_does_not(params):
    gen, text, mask = generator(9, 3, 3), prompts(2), np.ones(1, bool)
    for keep in (True, False):
        state, _ = stream(gen, params, begin(gen, params, text[:1], [8]), 5)
        before = np.asarray(state.cache.value)
        state = rollout.recache(
            gen, params, state, text[1:], mask, frames=9, keep_sink=gen.keeps_sink(15, keep)
        )
        kept = np.array_equal(before[:, :, :3], np.asarray(state.cache.value)[:, :, :3])
        assert kept == keep
        assert int(state.cache.start[0]) == (0 if keep else 6)
    assert not gen.keeps_sink(9, True)  # the window still reaches back to the sink: it is rewritten


def test_relative_rope_runs_3000_frames_in_constant_memory(params):
    """State sizes never change, values stay finite, and late blocks look like early ones."""
    gen = generator(6, 3, 3, "relative", steps=(1000,))
    state = begin(gen, params, prompts(1), [0])
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(state)]
    early = late = None
    state, early = rollout.rollout(gen, params, state, 10)
    for _ in range(99):
        state, late = rollout.rollout(gen, params, state, 10)
    assert int(state.frame) == 3000
    assert [leaf.nbytes for leaf in jax.tree.leaves(state)] == sizes
    assert np.isfinite(np.asarray(late)).all()
    assert float(jnp.std(late)) == pytest.approx(float(jnp.std(early)), rel=0.1)


def test_relative_and_absolute_rope_agree_until_the_window_is_full_and_without_a_sink(params):
    for sink, blocks, equal in ((3, 3, True), (0, 6, True), (3, 6, False)):
        videos = []
        for rope in ("absolute", "relative"):
            gen = generator(9, sink, 3, rope)
            videos.append(stream(gen, params, begin(gen, params, prompts(1), [1]), blocks)[1])
        assert np.allclose(*videos, **ROUNDING) == equal


def test_absolute_rope_has_no_table_to_run_out_of(params):
    """Far beyond the release's 1024 positions, moving everything by a constant changes nothing."""
    gen = generator(9, 0, 3)
    noise_of_start = dataclasses.replace(gen, noise=_same_noise)

    def play(offset):
        state = begin(noise_of_start, params, prompts(1), [1])
        state = dataclasses.replace(
            state,
            frame=jnp.int32(offset),
            cache=rollout.cache_lib.restart(state.cache, jnp.int32(offset)),
        )
        return stream(noise_of_start, params, state, 4)[1]

    np.testing.assert_allclose(play(0), play(1_000_000), rtol=1e-3, atol=1e-3)


def _same_noise(seeds, positions, step, shape):
    """Noise that does not know where in the video it is."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.random.normal(key, (seeds.shape[0], positions.shape[-1], *shape))


def test_the_cache_is_updated_in_place(params):
    """The step consumes its state: the same buffer holds the cache afterwards, and the old handle is gone."""
    gen = generator()
    state = begin(gen, params, prompts(1), [1])
    state, _ = rollout.step(gen, params, state)
    before = state.cache.key
    address = before.unsafe_buffer_pointer()
    state, _ = rollout.step(gen, params, state)
    assert before.is_deleted()
    assert state.cache.key.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize("scanned", [False, True])
def test_the_compiled_program_never_copies_the_cache(params, rope, scanned):
    """No instruction but the in-place writes makes an array as large as the cache."""
    gen = generator(rope=rope)
    state = begin(gen, params, prompts(2), [1, 2])
    program = rollout.rollout if scanned else rollout.step
    made = {}
    lowered = program.lower(gen, params, state, *([4] if scanned else []))
    for line in compiled(lowered).as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if found and np.prod([int(n) for n in found[1].split(",")]) >= state.cache.key.size:
            made.setdefault(found[2], []).append(line.strip())
    assert "scatter" in made  # the search sees what it is looking for
    assert not {"copy", "transpose", "concatenate", "gather", "select"} & set(made), made


# --- flush, cut and other windows -------------------------------------------------------------------

EVERYONE = np.ones(1, bool)


def streamed(gen, params, blocks):
    return stream(gen, params, begin(gen, params, prompts(1), [8]), blocks)[0]


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_three_blocks_after_a_flush_equal_those_after_a_fresh_cache_of_the_same_frames(params, rope):
    gen, text = generator(rope=rope), prompts(2)
    cache_lib = rollout.cache_lib
    state = rollout.flush(gen, params, streamed(gen, params, 5), text[1:], EVERYONE)
    kept = cache_lib.frames_at(state.cache, jnp.asarray([[0, 1, 2, 13, 14]]))
    pristine = kept.key[:, :, :3] if rope == "absolute" else state.cache.sink_key
    fresh = begin(gen, params, text[1:], [8])
    cache = cache_lib.write(fresh.cache, cache_lib.BlockKV(pristine, kept.value[:, :, :3]), 0)
    cache = dataclasses.replace(cache, ring_start=jnp.asarray([13]))
    cache = cache_lib.write(cache, jax.tree.map(lambda x: x[:, :, 3:], kept), 13)
    fresh = dataclasses.replace(fresh, cache=cache, frame=jnp.int32(15))
    flushed, expected = (stream(gen, params, s, 3)[1] for s in (state, fresh))
    np.testing.assert_allclose(flushed, expected, **ROUNDING)


def test_a_cut_moves_the_kept_frames_away_for_one_block_only(params):
    """Against turning the keys of everything kept back by the gap, which rotations cannot tell apart."""
    gen, text = generator(rope="relative"), prompts(2)
    cache_lib, gap = rollout.cache_lib, 17
    flushed = rollout.flush(gen, params, streamed(gen, params, 5), text[1:], EVERYONE)
    placed = cache_lib.place_sink(flushed.cache, flushed.frame + 3)
    turned = rollout.rope.shift_frames(placed.key, jnp.asarray([-gap]))
    context = cache_lib.context(dataclasses.replace(placed, key=turned))
    noise = gen.noise(flushed.seeds, jnp.arange(15, 18), jnp.int32(0), (*SIZE, 4))
    expected, own = by_hand(gen, params, flushed, noise, context)

    state = rollout.cut(gen, params, streamed(gen, params, 5), text[1:], EVERYONE, gap=gap)
    again = jax.tree.map(jnp.copy, state)
    kept = np.asarray(state.cache.key[:, :, 3:5])
    state, latents = rollout.step(gen, params, state)
    np.testing.assert_allclose(latents, expected, **ROUNDING)
    # What was kept is untouched, and the block's own keys are those of its frames, not of the gap.
    np.testing.assert_array_equal(state.cache.key[:, :, 3:5], kept)
    np.testing.assert_allclose(state.cache.key[:, :, 5:8], own.key, rtol=1e-3, atol=1e-3)
    assert int(state.gap[0]) == 0

    without = dataclasses.replace(again, gap=jnp.zeros_like(again.gap))
    plain = dataclasses.replace(jax.tree.map(jnp.copy, again), gap=None)
    cut_without_gap, flush = (stream(gen, params, s, 2)[1] for s in (without, plain))
    np.testing.assert_allclose(cut_without_gap, flush, **ROUNDING)
    assert np.abs(np.asarray(latents) - flush[:, :3]).max() > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def by_hand(gen, params, state, noisy, context):
    """The passes of a block over a given context: its latents, and the clean pass's keys and values."""
    steps = rollout.schedule.few_step_table(gen.sampler)
    positions, x = jnp.arange(15, 18), noisy
    for index, (t, sigma, next_sigma) in enumerate(
        zip(steps.timesteps, steps.sigmas, steps.next_sigmas, strict=True)
    ):
        velocity, _ = gen.velocity(params, x, jnp.float32(t), state.text, positions, context)
        fresh = gen.noise(state.seeds, positions, jnp.int32(index + 1), (*SIZE, 4))
        x = (1 - next_sigma) * (x - sigma * velocity) + next_sigma * fresh
    return x, gen.context_pass(params, state.text, x, positions, context)


def test_one_sample_of_a_batch_is_cut_and_another_flushed(params):
    gen, text, new = generator(), prompts(2), prompts(2, 1)
    state, _ = stream(gen, params, begin(gen, params, text, [4, 9]), 4)
    state = rollout.cut(gen, params, state, new, np.asarray([True, False]))
    state = rollout.flush(gen, params, state, new, np.asarray([False, True]))
    _, together = stream(gen, params, state, 2)
    for row, (seed, policy) in enumerate(((4, rollout.cut), (9, rollout.flush))):
        state, _ = stream(gen, params, begin(gen, params, text[row : row + 1], [seed]), 4)
        state = policy(gen, params, state, new[row : row + 1], EVERYONE)
        np.testing.assert_allclose(together[row], stream(gen, params, state, 2)[1][0], **ROUNDING)


def test_a_recache_after_a_flush_reads_the_frames_since(params):
    gen = generator()
    extent = {"start": 0, "keep_sink": True}
    assert gen.recache_extent(frame=9, ring_start=3, **extent) == (9, False)  # as the release does
    assert gen.recache_extent(frame=30, ring_start=3, **extent) == (12, True)
    assert gen.recache_extent(frame=33, ring_start=28, **extent) == (8, True)  # the sink and 28..32
    assert gen.recache_extent(frame=60, ring_start=28, **extent) == (12, True)
    assert gen.recache_extent(frame=33, start=0, ring_start=28, keep_sink=False) == (5, False)

    text = prompts(2)
    for keep_sink, length in ((True, 8), (False, 5)):
        state = rollout.flush(gen, params, streamed(gen, params, 6), text[:1], EVERYONE)
        state, _ = stream(gen, params, state, 1)
        before = np.asarray(state.cache.value)
        frames, keeps = gen.recache_extent(frame=21, start=0, ring_start=16, keep_sink=keep_sink)
        state = rollout.recache(gen, params, state, text[1:], EVERYONE, frames=frames, keep_sink=keeps)
        after = np.asarray(state.cache.value)
        assert np.array_equal(after[:, :, :3], before[:, :, :3]) == keep_sink
        assert np.abs(after[-1, :, 3:5] - before[-1, :, 3:5]).min() > 0  # no text reaches the first layer
        assert (int(state.cache.length[0]), int(state.cache.end[0])) == (length, 21)


def test_another_window_goes_on_from_the_frames_there_are(params):
    """While none is evicted growing changes nothing; after that, shrinking keeps the latest."""
    small, large = generator(9, 3, 3), generator()
    state = rollout.resize(large, streamed(small, params, 2))
    assert state.history.shape[1] == 12
    grown, always = (stream(large, params, s, 2)[1] for s in (state, streamed(large, params, 2)))
    np.testing.assert_allclose(grown, always, **ROUNDING)

    wide = streamed(large, params, 6)
    state = rollout.resize(small, wide)
    flushed = rollout.flush(large, params, wide, prompts(1), EVERYONE, frames=3)
    _, expected = stream(large, params, flushed, 1)
    _, latents = stream(small, params, state, 1)
    np.testing.assert_allclose(latents, expected, **ROUNDING)
