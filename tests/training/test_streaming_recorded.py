"""Streaming long tuning, three consecutive clips, against the release's numbers (fixture H3a).

The recording switches the prompt at frame 30, in its second clip. The release then zeroes its cache,
protects the sink from being rewritten and goes on attending to keys and values of zero there; ours
rebuilds the sink. So the plain comparison ends at frame 30. With the zero sink put back in, everything
agrees to the end: latents, losses, gradients and the cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import cache as cache_lib
from longlive_jax.cache import BlockKV
from longlive_jax.ops.windowed_attention import CachedContext
from longlive_jax.training import losses, recache
from longlive_jax.training.losses import DMDConfig
from longlive_jax.training.rollout import SelfForcing, Switch
from longlive_jax.training.streaming import Streaming
from tests.fixtures import load
from tests.training._recorded import (
    WINDOW,
    assert_gradients,
    channels_last,
    generator,
    params_of,
    quick_jit,
    score,
    table_noise,
)

CHAINED = {"rtol": 1e-4, "atol": 1e-4}
CHUNKS = ["chunk0_gen", "chunk1_critic", "chunk2_gen"]
CONFIG = DMDConfig()


def streaming_of(index):
    """The settings of the recording, with the noise of its clip `index`."""
    recorded, name = load("H3a"), CHUNKS[index]
    initial = recorded[f"{name}/gen_rng00_randn"][0]
    exits = np.full(initial.shape[1] // 3, recorded["exit_steps_per_chunk"][index], np.int32)
    first = int(recorded[f"{name}/info_start_new_overlap_from_to"][0])
    noise = table_noise(initial, recorded[f"{name}/gen_rng01_randn_like"], exits, first=first)
    forcing = SelfForcing(generator(noise), cache_gradient="opening")
    return Streaming(forcing, sequence_frames=57), exits


def begin(streaming):
    recorded = load("H3a")
    switch = Switch(jnp.asarray(recorded["cond_switch"]), jnp.int32(recorded["switch_frame_index"]))
    return streaming.begin(recorded["cond"], np.zeros(1, np.uint32), latent_size=(4, 6), switch=switch)


def advance(sequence, index):
    streaming, exits = streaming_of(index)
    step = quick_jit(functools.partial(streaming.advance, new_frames=3 * len(exits)))
    after, rollout = step(params_of("H3a", "w_generator/"), sequence, exits)
    return streaming, after, rollout


def clip_of(streaming, rollout, latents):
    """With the recording's stand-in for the VAE."""
    return streaming.clip(rollout, latents, decode=lambda z: 0.5 * z, encode=lambda p: 1.5 * p)


def check_clip(name, streaming, after, rollout):
    recorded = load("H3a")
    clip, mask = clip_of(streaming, rollout, rollout.latents)
    np.testing.assert_array_equal(mask, recorded[f"{name}/gradient_mask_frames"])
    np.testing.assert_allclose(clip, channels_last(recorded[f"{name}/full_chunk"]), **CHAINED)
    np.testing.assert_allclose(
        after.history, channels_last(recorded[f"{name}/previous_frames_saved"]), **CHAINED
    )
    start, new, overlap, *_ = recorded[f"{name}/info_start_new_overlap_from_to"]
    assert int(rollout.first) == start
    assert rollout.latents.shape[1] == new == streaming.choices(int(start))[0]
    assert clip.shape[1] - new == overlap
    assert int(after.frame) == start + new


def check_generator(name, streaming, rollout):
    recorded, params = load("H3a"), params_of("H3a", "w_generator/")
    real, fake = params_of("H3a", "w_real/"), params_of("H3a", "w_fake/")
    timesteps = losses.timestep_law(CONFIG, recorded[f"{name}/loss_rng00_randint"].reshape(1))

    def loss(params):
        clip, mask = clip_of(streaming, rollout, streaming.forcing.latents(params, rollout))
        return losses.dmd_loss(
            CONFIG,
            clip,
            timesteps,
            channels_last(recorded[f"{name}/loss_rng01_randn_like"][0]),
            critic=score(fake, rollout.text),
            teacher=score(real, rollout.text),
            teacher_uncond=score(real, recorded["uncond"]),
            mask=mask,
        )[0]

    value, gradients = quick_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, recorded[f"{name}/loss"], rtol=1e-4)
    np.testing.assert_allclose(norm_of(gradients), recorded[f"{name}/grad_norm"], rtol=1e-3)
    assert_gradients(gradients, "H3a", f"{name}/grad/")


def check_critic(name, streaming, rollout):
    recorded = load("H3a")
    timesteps = losses.timestep_law(CONFIG, recorded[f"{name}/loss_rng00_randint"].reshape(1))
    clip, mask = clip_of(streaming, rollout, rollout.latents)

    def loss(params):
        critic = score(params, rollout.text)
        noise = channels_last(recorded[f"{name}/loss_rng01_randn_like"][0])
        return losses.critic_loss(CONFIG, clip, timesteps, noise, critic=critic, mask=mask)

    value, gradients = quick_jit(jax.value_and_grad(loss))(params_of("H3a", "w_fake/"))
    np.testing.assert_allclose(value, recorded[f"{name}/loss"], rtol=1e-4)
    np.testing.assert_allclose(norm_of(gradients), recorded[f"{name}/grad_norm"], rtol=1e-3)


def norm_of(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


rewritten = recache._rewritten


def with_zero_sink(context_pass, count, cache, timeline, history, frame, at):
    """What the release does at a switch after frame 21: a sink of zeros, attended to."""
    if count < WINDOW.window_frames:
        return rewritten(context_pass, count, cache, timeline, history, frame, at)
    sink = cache.sink_slots
    layers, batch, _, frame_len, *head = cache.key.shape
    zeros = jnp.zeros((layers, batch, sink, frame_len, *head))
    tokens = zeros.reshape(layers, batch, sink * frame_len, *head)
    context = CachedContext(tokens, tokens, jnp.full(batch, sink * frame_len))
    local = count - sink
    own = context_pass(history[:, -local:], frame - local + jnp.arange(local), context)
    own = jax.tree.map(lambda x: jnp.concatenate([zeros, x], axis=2), own)
    cache = cache_lib.write(cache_lib.restart(cache, frame - count), own, frame - count)
    if timeline is not None:
        ring = cache.slots - sink
        latest = jax.tree.map(lambda x: x[:, :, -ring:], own)
        timeline = cache_lib.place(timeline, BlockKV(zeros, zeros), jnp.int32(0))
        timeline = cache_lib.place(timeline, latest, at - ring)
    return cache, timeline


@pytest.fixture(scope="module")
def opening():
    """The first clip; the switch is still to come."""
    return advance(begin(streaming_of(0)[0]), 0)


def test_opening_clip(opening):
    check_clip("chunk0_gen", *opening)
    check_generator("chunk0_gen", opening[0], opening[2])


def test_later_clips_with_the_zero_sink(opening, monkeypatch):
    monkeypatch.setattr(recache, "_rewritten", with_zero_sink)
    sequence = opening[1]
    for index, check in ((1, check_critic), (2, check_generator)):
        streaming, sequence, rollout = advance(sequence, index)
        check_clip(CHUNKS[index], streaming, sequence, rollout)
        check(CHUNKS[index], streaming, rollout)
    assert streaming.choices(int(sequence.frame)) == ()
    check_final_keys(sequence.cache)


def check_final_keys(cache):
    """Both keep frames 51 to 56; the release's sink holds zeros."""
    theirs = load("H3a")["final_kv_k"].reshape(2, 1, 33, 6, 2, 16)
    assert not theirs[:, :, :3].any()
    kept = cache_lib.in_order(cache).key
    np.testing.assert_allclose(kept[:, :, 3:], theirs[:, :, 27:], **CHAINED)


def test_our_sink_after_a_switch_holds_frames(opening):
    """Without the emulation the same numbers up to the switch, others from there on."""
    recorded = load("H3a")
    streaming, sequence, rollout = advance(opening[1], 1)
    clip, _ = clip_of(streaming, rollout, rollout.latents)
    theirs = channels_last(recorded["chunk1_critic/full_chunk"])
    np.testing.assert_allclose(clip[:, :12], theirs[:, :12], **CHAINED)  # up to frame 30
    assert np.abs(clip[:, 12:15] - theirs[:, 12:15]).max() > 0.05
    np.testing.assert_array_equal(rollout.graded, np.arange(21, 39) >= 30)
    assert int(sequence.cache.start[0]) == 9  # the sink: the oldest of the 21 frames before the switch
    assert np.asarray(cache_lib.in_order(sequence.cache).key[:, :, : WINDOW.sink_frames]).all()


@pytest.mark.parametrize("frame", [0, 21, 39])
def test_the_sequence_ends_where_a_clip_no_longer_fits(frame):
    streaming, _ = streaming_of(0)
    assert streaming.choices(frame) == ((21,) if frame == 0 else (18,))
    assert streaming.choices(57) == streaming.choices(42) == ()
