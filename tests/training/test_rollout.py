"""The one-pass rollout against the definition, and how it behaves: programs, switches, batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import cache as cache_lib
from longlive_jax.config import SamplerConfig, TransformerConfig, WindowConfig
from longlive_jax.errors import UserError
from longlive_jax.inference.rollout import Generator
from longlive_jax.models.transformer import Transformer, init_params
from longlive_jax.training.rollout import SelfForcing, Switch, draw_exit_steps
from longlive_jax.training.streaming import Streaming
from tests.training._recorded import quick_jit
from tests.training._sequential import sequential

CONFIG = TransformerConfig(
    dim=16, ffn_dim=24, num_heads=2, num_layers=2, freq_dim=8, text_dim=6, text_len=5, latent_channels=4
)
MODEL = Transformer(CONFIG)
# Sink and window are no multiples of the block, and a clip is longer than the window.
WINDOW = WindowConfig(window_frames=5, sink_frames=1, block_frames=2)
FORCING = SelfForcing(Generator(MODEL, WINDOW, SamplerConfig()))
# As at inference: no noise in the context, and a sink that stays.
AS_INFERRED = dataclasses.replace(FORCING, renoise_context=False, keep_sink=True)
SIZE = (2, 4)
SEEDS = np.arange(2, dtype=np.uint32)
NEVER = 1000


@functools.cache
def params():
    shapes = jax.eval_shape(lambda key: init_params(MODEL, key), jax.random.key(0))
    draw = np.random.default_rng(0)

    def one(path, leaf):
        spread = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.2
        value = spread * draw.standard_normal(leaf.shape, np.float32)
        return value + 1 if path[-1].key == "scale" else value

    return jax.tree_util.tree_map_with_path(one, shapes)


def prompt(seed, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, CONFIG.text_len, CONFIG.text_dim))


def begin(forcing=FORCING, *, switch_frame=NEVER, batch=2):
    switch = Switch(prompt(8, batch), jnp.int32(switch_frame))
    streaming = Streaming(forcing, clip_frames=8, new_frames=(6,), sequence_frames=40)
    return streaming, streaming.begin(prompt(7, batch), SEEDS[:batch], latent_size=SIZE, switch=switch)


@functools.partial(quick_jit, static_argnums=0, static_argnames=("new_frames", "keep_context"))
def advance(streaming, params, sequence, exits, *, new_frames, keep_context=True):
    return streaming.advance(params, sequence, exits, new_frames=new_frames, keep_context=keep_context)


def direction(frames):
    """A loss that is no function of anything but the latents it is given."""
    return jax.random.normal(jax.random.key(frames), (2, frames, *SIZE, CONFIG.latent_channels))


@quick_jit
def gradient(params, rollout):
    def loss(params):
        frames = FORCING.latents(params, rollout)
        return jnp.vdot(frames, direction(frames.shape[1]))

    return jax.grad(loss)(params)


CASES = {
    "no switch": NEVER,
    "switch before the window is full": 2,
    "switch where the window is just passed": 6,
    "switch between two clips": 8,
    "switch within the second clip": 11,
}


@pytest.mark.parametrize("case", CASES)
def test_latents_and_gradients_equal_the_sequential_definition(case):
    """An opening clip of 4 blocks and a later one of 3, each block with its own exit step.

    Straight-through; the other modes of the gradient are compared with recordings.
    """
    switch_frame, clips = CASES[case], [[1, 0, 2, 1], [2, 1, 0]]

    def losses(params):
        latents = sequential(
            FORCING,
            params,
            [prompt(7), prompt(8)],
            SEEDS,
            clips,
            switch_frame=switch_frame,
            size=(*SIZE, CONFIG.latent_channels),
            straight_through=[True, True],
        )
        return [jnp.vdot(x, direction(x.shape[1])) for x in latents], latents

    _, pull, latents = jax.vjp(losses, params(), has_aux=True)
    gradients = [pull([jnp.float32(i == j) for j in range(2)])[0] for i in range(2)]
    streaming, sequence = begin(switch_frame=switch_frame)
    for index, exits in enumerate(clips):
        exit_steps = jnp.asarray(exits, jnp.int32)
        sequence, rollout = advance(streaming, params(), sequence, exit_steps, new_frames=2 * len(exits))
        np.testing.assert_allclose(rollout.latents, latents[index], rtol=1e-4, atol=1e-5)

        ours = gradient(params(), rollout)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(gradients[index]), strict=True
        ):
            distance, norm = np.linalg.norm(a - b), np.linalg.norm(b)
            assert distance <= 1e-4 * norm, f"clip {index}, {jax.tree_util.keystr(path)}: {distance / norm}"


def test_two_programs_whatever_the_position_the_exit_steps_and_the_switch():
    advance.clear_cache()
    for switch_frame, exits in ((10, 0), (22, 2), (NEVER, 3)):
        streaming, sequence = begin(switch_frame=switch_frame)
        for frame in (0, 8, 14, 20):
            (count,) = streaming.choices(frame)
            steps = jnp.full(count // 2, exits, jnp.int32)
            sequence, _ = advance(streaming, params(), sequence, steps, new_frames=count)
    assert advance._cache_size() == 2


def test_without_its_context_a_rollout_is_the_same_but_has_no_gradient():
    streaming, sequence = begin()
    steps = jnp.asarray([1, 1, 1, 1], jnp.int32)
    _, with_it = advance(streaming, params(), sequence, steps, new_frames=8)
    after, without = advance(streaming, params(), sequence, steps, new_frames=8, keep_context=False)
    np.testing.assert_array_equal(with_it.latents, without.latents)
    np.testing.assert_array_equal(after.history, without.latents)
    with pytest.raises(ValueError, match="keep_context"):
        FORCING.latents(params(), without)


def with_inference(switch_frame):
    """Our clips of 8 and 6 frames of all four steps, and what inference generates, and both caches."""
    generator = AS_INFERRED.generator
    streaming, sequence = begin(AS_INFERRED, switch_frame=switch_frame)
    state = generator.init(params(), prompt(7), SEEDS, latent_size=SIZE)
    for count in (8, 6):
        if int(state.frame) == switch_frame:
            state = generator.recache(params(), state, prompt(8), np.ones(2, bool), frames=5, keep_sink=True)
        steps = jnp.full(count // 2, 3, jnp.int32)
        sequence, rollout = advance(streaming, params(), sequence, steps, new_frames=count)
        state, expected = infer(generator, params(), state, count // 2)
        yield rollout.latents, expected, sequence.cache, state.cache


infer = quick_jit(Generator.rollout, static_argnums=(0, 3))


@pytest.mark.parametrize("switch_frame", [NEVER, 8])
def test_all_steps_without_noise_in_the_context_are_inference(switch_frame):
    """Latents and cache; also across a switch that leaves the sink alone."""
    for ours, expected, cache, inferred in with_inference(switch_frame):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cache.key, inferred.key, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(cache.start, inferred.start)
        np.testing.assert_array_equal(cache.end, inferred.end)


def test_noise_in_the_context_changes_what_follows_the_first_block():
    steps, results = jnp.full(4, 3, jnp.int32), []
    for forcing in (FORCING, AS_INFERRED):
        streaming, sequence = begin(forcing)
        results.append(advance(streaming, params(), sequence, steps, new_frames=8)[1].latents)
    np.testing.assert_array_equal(results[0][:, :2], results[1][:, :2])
    assert np.abs(results[0][:, 2:] - results[1][:, 2:]).max() > 1e-4


def test_keep_sink_holds_once_the_window_is_past_the_sink():
    """Before that everything is rewritten."""
    sinks = {}
    for switch_frame in (4, 6, NEVER):
        streaming, sequence = begin(AS_INFERRED, switch_frame=switch_frame)
        steps = jnp.zeros(4, jnp.int32)
        sequence, _ = advance(streaming, params(), sequence, steps, new_frames=8)
        sinks[switch_frame] = cache_lib.in_order(sequence.cache).key[:, :, :1]
    np.testing.assert_array_equal(sinks[6], sinks[NEVER])
    assert np.abs(sinks[4] - sinks[NEVER]).max() > 1e-2


def test_the_clip_is_judged_by_the_prompt_of_its_last_block():
    for switch_frame, switched, graded in ((8, True, 6), (12, True, 2), (13, False, 6), (14, False, 6)):
        streaming, sequence = begin(switch_frame=switch_frame)
        for count in (8, 6):
            steps = jnp.zeros(count // 2, jnp.int32)
            sequence, rollout = advance(streaming, params(), sequence, steps, new_frames=count)
        np.testing.assert_array_equal(rollout.text, prompt(8) if switched else prompt(7))
        assert rollout.graded.tolist() == [False] * (6 - graded) + [True] * graded


@pytest.mark.parametrize(
    ("switch_frame", "first", "second"),
    [
        (NEVER, [0, 1], []),
        (8, [0, 1], [8, 9]),
        (9, [0, 1], [10, 11]),  # the first block at or after it
        (12, [0, 1], [12, 13]),
        (4, [0, 1, 4, 5], []),
    ],
)
def test_blocks_that_open_a_video_or_follow_a_switch(switch_frame, first, second):
    streaming, sequence = begin(switch_frame=switch_frame)
    for count, expected in ((8, first), (6, second)):
        start = int(sequence.frame)
        sequence, rollout = advance(
            streaming, params(), sequence, jnp.zeros(count // 2, jnp.int32), new_frames=count
        )
        assert (start + np.flatnonzero(rollout.opens)).tolist() == expected
    unswitched = dataclasses.replace(begin()[1], switch=None)
    _, rollout = advance(streaming, params(), unswitched, jnp.zeros(4, jnp.int32), new_frames=8)
    assert np.flatnonzero(rollout.opens).tolist() == [0, 1]


def test_samples_of_a_batch_do_not_mix():
    streaming, sequence = begin(switch_frame=4)
    _, alone = begin(switch_frame=4, batch=1)
    alone = dataclasses.replace(
        alone,
        text=sequence.text[1:],
        seeds=sequence.seeds[1:],
        switch=dataclasses.replace(alone.switch, text=sequence.switch.text[1:]),
    )
    steps = jnp.ones(4, jnp.int32)
    _, both = advance(streaming, params(), sequence, steps, new_frames=8)
    _, one = advance(streaming, params(), alone, steps, new_frames=8)
    np.testing.assert_allclose(both.latents[1:], one.latents, rtol=1e-5, atol=1e-5)


def test_an_unbounded_window_keeps_the_whole_clip():
    window = WindowConfig(window_frames=-1, sink_frames=1, block_frames=2)
    wide = dataclasses.replace(window, window_frames=8)
    results = []
    for chosen in (window, wide):
        forcing = SelfForcing(Generator(MODEL, chosen, SamplerConfig()))
        sequence = forcing.begin(prompt(7), SEEDS, latent_size=SIZE, history_frames=8)
        step = quick_jit(functools.partial(forcing.roll_out, opening=True, keep_context=True))
        _, rollout = step(params(), sequence, jnp.asarray([0, 1, 0, 1]))
        results.append((rollout.latents, quick_jit(forcing.latents)(params(), rollout)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_exit_steps_are_uniform_and_shared_unless_asked():
    draw = jax.vmap(lambda key: draw_exit_steps(key, 7, 4))
    drawn = draw(jax.random.split(jax.random.key(0), 400))
    assert (drawn == drawn[:, :1]).all()
    assert (np.bincount(drawn[:, 0], minlength=4) > 70).all()
    apart = draw_exit_steps(jax.random.key(0), 64, 4, same_for_all_blocks=False)
    assert set(apart.tolist()) == {0, 1, 2, 3}


def test_settings_that_make_no_sense_are_refused():
    relative = dataclasses.replace(WINDOW, rope="relative")
    with pytest.raises(UserError, match="rope='relative'"):
        SelfForcing(Generator(MODEL, relative, SamplerConfig()))
    for change, message in (
        ({"clip_frames": 4}, "clip_frames=4"),
        ({"new_frames": (8,)}, r"new_frames=\(8,\)"),
        ({"new_frames": (3,)}, r"new_frames=\(3,\)"),
        ({"sequence_frames": 6}, "sequence_frames=6"),
    ):
        with pytest.raises(UserError, match=message):
            Streaming(FORCING, **{"clip_frames": 8, "new_frames": (6,), "sequence_frames": 40, **change})
    with pytest.raises(UserError, match="history_frames=4"):
        FORCING.begin(
            prompt(7), SEEDS, latent_size=SIZE, history_frames=4, switch=Switch(prompt(8), jnp.int32(2))
        )
    streaming, sequence = begin()
    with pytest.raises(ValueError, match="exit_steps"):
        streaming.advance(params(), sequence, jnp.zeros(3, jnp.int32), new_frames=8)
