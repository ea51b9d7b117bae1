"""The pipeline as a user calls it: a checkpoint directory, prompts in, frames out."""

import dataclasses

import jax
import numpy as np
import pytest

from longlive_jax import Pipeline, PromptSwitch, Story, UserError, checkpoint
from longlive_jax.config_dict import override
from longlive_jax.inference.pipeline import one_ahead
from longlive_jax.video import read_video

PROMPT, OTHER = "a red circle moves left", "a blue square stays on a dark background"


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return Pipeline.load(tiny_checkpoint)


def test_five_lines_from_checkpoint_to_file(tiny_checkpoint, tmp_path):
    pipe = Pipeline.load(tiny_checkpoint)
    video = pipe(PROMPT, frames=6, seed=1)
    assert video.frames.shape == (1, 21, 32, 48, 3)
    assert video.latents.shape == (1, 6, 4, 6, 16)
    (path,) = video.save(tmp_path / "video.mp4")
    assert read_video(path).shape == (21, 32, 48, 3)


def test_the_call_is_reproducible_and_the_seed_and_prompt_matter(pipe):
    first = pipe(PROMPT, frames=6, seed=1).latents
    np.testing.assert_array_equal(pipe(PROMPT, frames=6, seed=1).latents, first)
    assert np.abs(pipe(PROMPT, frames=6, seed=2).latents - first).max() > 0.1
    assert np.abs(pipe(OTHER, frames=6, seed=1).latents - first).max() > 1e-3


def test_the_stream_yields_the_frames_of_the_call(pipe):
    whole = pipe(PROMPT, frames=8, seed=3)
    chunks = list(pipe.stream(PROMPT, frames=8, seed=3))
    assert [chunk.frame for chunk in chunks] == [0, 3, 6]
    assert [chunk.latents.shape[1] for chunk in chunks] == [3, 3, 2]  # cut at 8 frames
    assert [chunk.video.shape[1] for chunk in chunks] == [9, 12, 8]
    np.testing.assert_array_equal(np.concatenate([c.video for c in chunks], axis=1), whole.frames)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_device_of_its_own_decodes_the_same_video(pipe, devices):
    """And holds all of the VAE, while the rollout stays where it is."""
    apart = pipe.over(devices, decodes_apart=True)
    *denoising, last = jax.devices()[: devices + 1]
    state = apart.begin(apart.encode_prompts([PROMPT]), [3])
    for _ in range(2):
        state, latents, pixels = apart.advance(state)
    for held in jax.tree.leaves((state.decoder, apart.vae_params, latents, pixels)):
        assert held.devices() == {last}
    for held in jax.tree.leaves(state.rollout):
        assert held.devices() == set(denoising)
    together = apart.over(devices)
    assert {d for held in jax.tree.leaves(together.vae_params) for d in held.devices()} == {denoising[0]}
    story = Story(PROMPT, (PromptSwitch(3, OTHER),))
    video, expected = (each(story, frames=8, seed=3) for each in (apart, together))
    np.testing.assert_array_equal(video.latents, expected.latents)
    np.testing.assert_array_equal(video.frames, expected.frames)
    np.testing.assert_allclose(video.latents, pipe(story, frames=8, seed=3).latents, atol=1e-4)


def test_a_device_for_the_vae_has_to_be_there(pipe, monkeypatch):
    with pytest.raises(
        UserError, match=r"devices=8 and one to decode apart: this process has 8; .* from 1 to 7"
    ):
        pipe.over(8, decodes_apart=True)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    with pytest.raises(
        UserError, match="devices=1 and one to decode apart: this process has 1; decode on the"
    ):
        pipe.over(decodes_apart=True)


def test_decoding_the_latents_at_once_gives_the_streamed_frames(pipe):
    video = pipe(PROMPT, frames=6, seed=3)
    pixels = pipe.vae.apply({"params": pipe.vae_params}, video.latents, method="decode")
    difference = np.abs(np.round((np.asarray(pixels) + 1) * 127.5) - video.frames.astype(float))
    assert difference.max() <= 1  # one grey level: rounding at the boundary


def test_videos_of_a_batch_equal_the_videos_alone(pipe):
    stories = [
        Story(PROMPT, (PromptSwitch(5, OTHER),)),
        Story(OTHER, (PromptSwitch(3, PROMPT, policy="keep"), PromptSwitch(8, OTHER, policy="clear"))),
    ]
    together = pipe(stories, frames=12, seed=[7, 3]).latents
    for row, (story, seed) in enumerate(zip(stories, (7, 3), strict=True)):
        alone = pipe(story, frames=12, seed=seed).latents
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_switch_changes_what_follows_and_nothing_before(pipe):
    plain = pipe(PROMPT, frames=9, seed=0).latents
    seen = []
    for policy in ("recache", "keep", "clear"):
        story = Story(PROMPT, (PromptSwitch(4, OTHER, policy=policy),))  # takes effect at frame 6
        latents = pipe(story, frames=9, seed=0).latents
        np.testing.assert_array_equal(latents[:, :6], plain[:, :6])
        assert np.abs(latents[:, 6:] - plain[:, 6:]).max() > 1e-3
        seen.append(latents[:, 6:])
    assert np.abs(seen[0] - seen[1]).max() > 1e-4
    assert np.abs(seen[1] - seen[2]).max() > 1e-4


def test_the_first_block_may_have_steps_of_its_own(pipe):
    """Its result is that of these steps, and the next ones follow it with the usual ones."""
    few, more = (1000, 500), (1000, 900, 600, 300)
    usual = dataclasses.replace(pipe, config=override(pipe.config, {"sampler.steps": few}))
    opened = dataclasses.replace(usual, config=override(usual.config, {"sampler.opening_steps": more}))
    whole = dataclasses.replace(pipe, config=override(pipe.config, {"sampler.steps": more}))
    a, b, c = (p([PROMPT, OTHER], frames=9, seed=0).latents for p in (usual, opened, whole))
    np.testing.assert_array_equal(b[:, :3], c[:, :3])
    assert np.abs(b[:, :3] - a[:, :3]).max() > 1e-3
    assert min(np.abs(b[:, 3:] - other[:, 3:]).max() for other in (a, c)) > 1e-3
    assert opened.generator == usual.generator  # one program for the blocks after it
    assert usual.opening_generator == usual.generator


def test_overrides_take_effect_and_are_checked(tiny_checkpoint):
    pipe = Pipeline.load(tiny_checkpoint, overrides={"window.window_frames": 6, "sampler.steps": "1000,500"})
    assert pipe.config.window.window_frames == 6
    assert pipe.config.sampler.steps == (1000, 500)
    with pytest.raises(UserError, match="windw"):
        Pipeline.load(tiny_checkpoint, overrides={"windw.sink_frames": 0})
    with pytest.raises(UserError, match="does not fit"):
        Pipeline.load(tiny_checkpoint, overrides={"transformer.ffn_dim": 32})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": 0}, "frames=0"),
        ({"frames": 6, "height": 33}, "height=33"),
        ({"frames": 6, "width": 0}, "width=0"),
        ({"frames": 6, "seed": [1, 2]}, "2 seeds for 1"),
        ({"frames": 6, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_refused_at_once(pipe, arguments, words):
    with pytest.raises(UserError, match=words):
        pipe.stream(PROMPT, **arguments)


def test_a_kept_lora_changes_the_video_and_can_be_left_out(tiny_checkpoint, tmp_path, pipe):
    import jax

    from longlive_jax import lora

    opened = checkpoint.open_checkpoint(tiny_checkpoint)
    adapters = lora.init(jax.random.key(0), pipe.params, rank=2)
    adapters = jax.tree.map(lambda x: x + 0.2, adapters)
    with checkpoint.create(tmp_path / "with", opened.config, source={}) as out:
        for part in opened.parts:
            out.add_tree(part, opened.load(part))
        out.add_tree("lora", adapters, alpha=4.0, rank=2)
        out.add_tokenizer(opened.tokenizer_path)
    adapted = Pipeline.load(tmp_path / "with")
    merged = lora.merge(pipe.params, adapters, scale=2.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), adapted.params, merged)
    plain = Pipeline.load(tmp_path / "with", use_lora=False)
    jax.tree.map(np.testing.assert_array_equal, plain.params, pipe.params)


def test_the_next_block_is_handed_over_before_the_last_one_is_fetched():
    events = []

    def blocks():
        for i in range(3):
            events.append(f"hand over {i}")
            yield i

    for i in one_ahead(blocks()):
        events.append(f"fetch {i}")
    assert events == ["hand over 0", "hand over 1", "fetch 0", "hand over 2", "fetch 1", "fetch 2"]


def test_nothing_goes_to_the_device_between_blocks(pipe):
    """Neither for latents nor for pixels; what is fetched, is fetched at the end."""
    stream = pipe.stream(PROMPT, frames=12, seed=3)
    next(stream)
    with jax.transfer_guard_host_to_device("disallow"):
        assert len(list(stream)) == 3


def test_a_checkpoint_without_a_vae_still_gives_latents(tiny_checkpoint, tmp_path, pipe):
    opened = checkpoint.open_checkpoint(tiny_checkpoint)
    with checkpoint.create(tmp_path / "latents", opened.config, source={}) as out:
        for part in ("transformer", "text_encoder"):
            out.add_tree(part, opened.load(part))
        out.add_tokenizer(opened.tokenizer_path)
    blind = Pipeline.load(tmp_path / "latents")
    with pytest.raises(UserError, match="no vae"):
        blind.stream(PROMPT, frames=3)
    blocks = [np.asarray(latents) for _, latents in blind.stream_latents(PROMPT, frames=6, seed=5)]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), pipe(PROMPT, frames=6, seed=5).latents)
