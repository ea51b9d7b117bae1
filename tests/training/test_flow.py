"""Flow matching: which frames of a batch share a noise level, and what the transformer is told of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import sharding, toy
from longlive_jax.cache import BlockKV
from longlive_jax.config import preset
from longlive_jax.errors import UserError
from longlive_jax.inference.parts import vae_of
from longlive_jax.training import flow, latents
from longlive_jax.training import world as worlds
from longlive_jax.training.config import ClipsConfig
from tests.training._runs import only_one_device, smoke


def levels(*, size, frames, causal, law="logit_normal", block=3, share=0.0):
    config = smoke("teacher", None, "unused", flow__levels=law, flow__frame_levels=share)
    drawn = flow._noise_levels(config, jax.random.key(0), (size, frames), block=block, causal=causal)
    assert drawn.shape == (size, frames)
    assert drawn.dtype == jnp.float32
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    return np.asarray(drawn)


def shared(drawn):
    """For every clip, which frames have the level of which: the first frame that has it, `[B, F]`."""
    return [[list(row).index(level) for level in row] for row in drawn]


BLOCKS = [0, 0, 0, 3, 3, 3]
FRAMES = [0, 1, 2, 3, 4, 5]
CLIP = [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
@pytest.mark.parametrize(
    ("causal", "share", "expected"),
    [
        (0, 0.0, [CLIP] * 8),
        (0, 0.5, [FRAMES] * 4 + [CLIP] * 4),
        (0, 1.0, [FRAMES] * 8),
        (2, 0.0, [BLOCKS] * 2 + [CLIP] * 6),
        (2, 0.5, [BLOCKS] * 2 + [FRAMES] * 3 + [CLIP] * 3),
        (2, 1.0, [BLOCKS] * 2 + [FRAMES] * 6),
        (8, 0.5, [BLOCKS] * 8),
    ],
)
def test_levels_are_of_blocks_then_of_frames_then_of_clips(law, causal, share, expected):
    drawn = levels(size=8, frames=6, causal=causal, law=law, share=share)
    assert shared(drawn) == expected
    # No level occurs in two clips, or in two blocks or frames that should differ.
    assert np.unique(drawn).size == sum(len(set(row)) for row in expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_level_for_each_frame_changes_no_other_level(share):
    """The share decides which frames follow the first of their clip; what is drawn stays."""
    every = levels(size=8, frames=6, causal=2, share=1.0)
    some = levels(size=8, frames=6, causal=2, share=share)
    apart = 2 + round(6 * share)
    np.testing.assert_array_equal(some[:apart], every[:apart])
    np.testing.assert_array_equal(some[apart:], np.repeat(every[apart:, :1], 6, axis=1))


def test_clips_need_not_be_whole_blocks_unless_they_are_causal():
    assert shared(levels(size=2, frames=4, causal=0, share=0.5)) == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert shared(levels(size=2, frames=1, causal=0, share=0.5)) == [[0], [0]]


@pytest.mark.parametrize(
    ("share", "causal_share", "told"),
    [
        (0.0, 0.0, {"whole": (8, 1)}),
        (0.5, 0.0, {"whole": (8, 6)}),
        (0.5, 0.25, {"causal": (2, 6), "whole": (6, 6)}),
    ],
)
@pytest.mark.usefixtures("fast_programs")
def test_the_transformer_is_told_the_noise_of_what_it_sees(
    share, causal_share, told, base, tmp_path, monkeypatch
):
    """One timestep per clip where all frames share it, one per frame elsewhere."""
    changes = {"flow__frame_levels": share, "flow__causal_share": causal_share}
    config = smoke("teacher", base, tmp_path / "run", **changes)
    with only_one_device():
        frozen = flow.load_frozen(config, sharding.make_mesh(data=1, fsdp=1))
    seen = {}

    def velocity(generator, params, noisy, sigma, text, context):
        """What is asked for, found by the levels it is told: the clips are ones under noise."""
        seen["whole" if context is None else "causal"] = sigma
        wide = sigma[:, :, None, None, None]
        return (noisy - (1 - wide)) / wide - 1

    monkeypatch.setattr(flow, "velocity", velocity)
    monkeypatch.setattr(flow, "clean_pass", lambda *_: BlockKV(None, None))  # `velocity` does without
    batch = {"latents": jnp.ones((8, 6, *frozen.latent_shape)), "caption": jnp.zeros(8, jnp.int32)}
    given = (config, frozen.generator, frozen.captions, frozen.start, batch)
    assert float(flow.loss_fn(*given, jax.random.key(0))[0]) < 1e-6
    assert {name: sigma.shape for name, sigma in seen.items()} == told
    if share:
        apart = round(len(seen["whole"]) * share)
        assert shared(np.asarray(seen["whole"])) == [FRAMES] * apart + [CLIP] * (len(seen["whole"]) - apart)


def loaded(config):
    with only_one_device():
        return flow.load_frozen(config, sharding.make_mesh(data=1, fsdp=1))


@pytest.mark.usefixtures("fast_programs")
def test_clips_that_switch_go_by_the_caption_of_their_end(base, tmp_path):
    """And show it from "begin" on, the other attributes before; the others are the clips they always were."""
    usual = smoke("teacher", base, tmp_path / "run")
    config = smoke("teacher", base, tmp_path / "run", flow__switch_share=0.5)
    frozen = loaded(config)
    clips, plain = flow.encoded_clips(config, frozen), flow.encoded_clips(usual, frozen)
    assert clips.folder != plain.folder
    rows = np.arange(8)
    found, before, scenes = clips.rows(rows), plain.rows(rows), clips.scenes(rows)
    begin = found["begin"]
    assert set(begin) == {0, 3}  # a clip of two blocks switches at the second, or nowhere
    whole = begin == 0
    for name in ("latents", "caption"):
        np.testing.assert_array_equal(found[name][whole], before[name][whole])
    assert (found["caption"][~whole] != before["caption"][~whole]).all()
    np.testing.assert_array_equal(found["latents"][~whole, :3], before["latents"][~whole, :3])

    # What is shown after the switch is what the caption says.
    ends = clips.switches.of(clips.clips, rows, scenes)
    np.testing.assert_array_equal(found["caption"], worlds.caption_rows(ends.codes, ends.template))
    world, vae = worlds.world_of(frozen.model), vae_of(frozen.model)
    row = int(np.flatnonzero(~whole)[0])
    first, last = vae.config.video_frames(3), vae.config.video_frames(6)
    story = toy.Story(starts=(0, first), codes=np.stack([scenes.codes, ends.codes], axis=1)[row : row + 1])
    video = toy.render_story(world, scenes[row : row + 1], story, frames=last)
    encoded = vae.apply({"params": frozen.vae_params}, video, method="encode")
    np.testing.assert_allclose(found["latents"][row], encoded[0], atol=2e-3)  # kept in float16


def test_clips_that_switch_show_what_they_end_with():
    """Read from the pixels, at the size that can be read."""
    world, vae, indices = toy.World(), preset("toy").vae, np.arange(8)
    clips = ClipsConfig(batch_size=8, frames=12)
    scenes = toy.sample_scenes(world, seed=clips.seed, indices=indices)
    ends = worlds.Switches(0.5, (3, 6)).of(clips, indices, scenes)
    assert set(ends.begin) == {0, 3, 6}
    frames = vae.video_frames(clips.frames)
    shown = toy.read(world, latents._render(world, scenes, ends, vae, frames=frames)).codes
    for clip, begin in enumerate(ends.begin):
        cut = vae.video_frames(int(begin)) if begin else 0
        assert (shown[clip, cut:, :2] == ends.codes[clip, :2]).all()
        assert (shown[clip, cut + 4 :] == ends.codes[clip]).all()  # a motion is seen over some frames
        assert (shown[clip, :cut, :2] == scenes.codes[clip, :2]).all()
        assert (shown[clip, : max(cut - 4, 0)] == scenes.codes[clip]).all()


@pytest.mark.parametrize("causal_share", [0.0, 1.0])
@pytest.mark.usefixtures("fast_programs")
def test_frames_before_a_switch_are_seen_and_not_learned(causal_share, base, tmp_path, monkeypatch):
    config = smoke("teacher", base, tmp_path / "run", flow__causal_share=causal_share, flow__switch_share=1.0)
    frozen = loaded(config)
    off = {"first": jnp.zeros((4, 6, 1, 1, 1)).at[:, :3].set(1.0), "last": jnp.zeros((4, 6, 1, 1, 1))}
    off["last"] = 1.0 - off["first"]
    wrong = "first"

    def velocity(generator, params, noisy, sigma, text, context):
        """Right about latents that are ones, but for an error in one block."""
        wide = sigma[:, :, None, None, None]
        return (noisy - (1 - wide)) / wide - 1 + off[wrong]

    monkeypatch.setattr(flow, "velocity", velocity)
    monkeypatch.setattr(flow, "clean_pass", lambda *_: BlockKV(None, None))
    batch = {"latents": jnp.ones((4, 6, *frozen.latent_shape)), "caption": jnp.zeros(4, jnp.int32)}

    def loss(begin):
        given = batch | {"begin": jnp.asarray(begin, jnp.int32)}
        return float(
            flow.loss_fn(config, frozen.generator, frozen.captions, frozen.start, given, jax.random.key(0))[0]
        )

    assert loss([3, 3, 3, 3]) < 1e-6
    assert loss([0, 0, 3, 3]) == pytest.approx(0.25, rel=1e-4)
    assert loss([0, 0, 0, 0]) == pytest.approx(0.5, rel=1e-4)
    # A clip counts the same wherever it switches, so the frames that are left count for more.
    wrong = "last"
    assert loss([0, 0, 0, 0]) == pytest.approx(0.5, rel=1e-4)
    assert loss([0, 0, 3, 3]) == pytest.approx(0.75, rel=1e-4)
    assert loss([3, 3, 3, 3]) == pytest.approx(1.0, rel=1e-4)


def test_clips_of_one_block_cannot_switch(base, tmp_path):
    with pytest.raises(UserError, match=r"data\.frames=3 .*flow\.switch_share"):
        smoke("teacher", base, tmp_path / "run", data__frames=3, flow__switch_share=0.5)
