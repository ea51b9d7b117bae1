"""The metrics on videos whose answer is known, and those of real videos on tiny stand-in networks."""

import dataclasses
import json

import numpy as np
import pytest

from longlive_jax import toy
from longlive_jax.config import preset
from longlive_jax.errors import UserError
from longlive_jax.experiments import features, metrics
from longlive_jax.experiments.metrics import METRICS, Batch
from longlive_jax.experiments.tasks import Segments, Work
from longlive_jax.inference.story import PromptSwitch, Story

CONFIG = preset("toy")


def batch_of(task, work, video, *, latents=None):
    frames = CONFIG.vae.latent_frames(video.shape[1])
    if latents is None:
        latents = np.zeros((len(video), frames, 8, 8, 16), np.float32)
    return Batch(CONFIG, task, work, video, latents, block_seconds=0.5, weight_bytes=2_000_000)


def test_a_story_that_obeys_scores_1_and_one_that_ignores_its_prompts_does_not():
    """The first clip is rendered as its story says, the second keeps showing its first prompt."""
    task = Segments(segments=3, segment_frames=9, changes=(4,))
    work = task.work(CONFIG, clips=2, seed=3)
    world = toy.World()
    shown = work.codes.copy()
    shown[1] = shown[1, :1]
    scenes = toy.sample_scenes(world, seed=3, indices=np.arange(2), split="held_out")
    begins = tuple(CONFIG.vae.video_frames(frame) for frame in work.starts)
    frames = CONFIG.vae.video_frames(task.frames)
    video = toy.render_story(world, scenes, toy.Story(starts=begins, codes=shown), frames=frames)
    pixels = np.round((video + 1) * 127.5).astype(np.uint8)
    table = METRICS["segments"].measure(batch_of(task, work, pixels))
    np.testing.assert_array_equal(table["segments.all"].shape, (2, 3))
    assert table["settled.all"][0].min() > 0.9
    assert table["segments.all"][1, 0] > 0.9
    assert table["settled.all"][1, 1:].max() == 0
    assert table["story.settled"][0] > 0.9


def test_a_collapse_is_seen_where_it_happens():
    random = np.random.default_rng(0)
    latents = random.normal(size=(2, 18, 4, 4, 16)).astype(np.float32)
    latents[0, 12:15] = latents[0, :3]  # block 4 of the first clip is the first block again
    work = Work((Story("a"), Story("b")), (0, 1))
    video = np.zeros((2, CONFIG.vae.video_frames(18), 32, 32, 3), np.uint8)
    table = metrics.collapse(batch_of(None, work, video, latents=latents))
    assert table["blocks.distance"].shape == (2, 5)
    assert table["blocks.distance"][0].argmin() == 3
    assert table["blocks.distance"][0, 3] == 0
    assert table["collapse.max"][0] == pytest.approx(1, abs=0.05)
    assert table["collapse.max"][1] < 0.1
    assert table["collapse.mean"][0] > table["collapse.mean"][1]


def test_speed_and_size_are_of_the_run():
    work = Work((Story("a"), Story("b")), (0, 1))
    video = np.zeros((2, 33, 32, 32, 3), np.uint8)
    batch = batch_of(None, work, video)
    # Two clips of 12 video frames per block, in half a second.
    assert metrics.speed(batch)["frames_per_second"].tolist() == [48, 48]
    assert metrics.size(batch)["weights_megabytes"].tolist() == [2, 2]
    assert set(metrics.PER_RUN) >= {"frames_per_second", "weights_megabytes", "cache_megabytes"}


# --- networks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A CLIP and a ViT of a few thousand random parameters, in the layout of published ones."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    words = ["[PAD]", "[UNK]", "[EOS]", "red", "blue", "square"]
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 6, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    models = {
        "clip": transformers.CLIPModel(config),
        "vit": transformers.ViTModel(transformers.ViTConfig(**vision)),
    }
    for name, model in models.items():
        for values in model.parameters():
            torch.nn.init.normal_(values, std=0.5)  # the usual start is so small that all pictures look alike
        model.save_pretrained(folder / name)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder / "clip")
    prepare = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "clip/preprocessor_config.json").write_text(
        json.dumps({**prepare, "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}})
    )
    (folder / "vit/preprocessor_config.json").write_text(
        json.dumps({**prepare, "size": {"height": 16, "width": 16}})
    )
    return folder


def videos():
    """Two clips of 9 latent frames: one changes halfway, one never does."""
    random = np.random.default_rng(1)
    count = CONFIG.vae.video_frames(9)
    first, second = random.integers(0, 256, (2, 16, 24, 3), np.uint8)
    changes = np.where(np.arange(count)[:, None, None, None] < CONFIG.vae.video_frames(6), first, second)
    return np.stack([changes, np.broadcast_to(first, changes.shape)]).astype(np.uint8)


def test_clip_scores_are_cosines_of_each_segment_with_its_prompt(networks):
    """Against CLIP's own forward pass on the same pictures and words."""
    import torch
    import transformers

    video = videos()
    story = Story("red square", (PromptSwitch(6, "blue square square square square square"),))
    work = Work((story, story), (0, 1))
    batch = dataclasses.replace(batch_of(None, work, video), models={"clip_score": str(networks / "clip")})
    table = METRICS["clip_score"].measure(batch)
    assert table["segments.clip_score"].shape == (2, 2)
    np.testing.assert_allclose(table["clip_score"], table["segments.clip_score"].mean(1))
    # Both show the same before the switch; after it, one shows something else.
    first, second = table["segments.clip_score"]
    assert first[0] == pytest.approx(second[0], abs=1e-4)
    assert abs(first[1] - second[1]) > 1e-3
    prepare = features.Preparation.read(networks / "clip/preprocessor_config.json")
    model = transformers.CLIPModel.from_pretrained(networks / "clip").eval()
    with torch.inference_mode():
        out = model(
            pixel_values=torch.from_numpy(prepare(video[0, :1])),
            input_ids=torch.tensor([[3, 5, 2]]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
        )
    expected = 100 * float((out.image_embeds * out.text_embeds).sum())
    assert first[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_still_video_is_consistent_and_a_cut_is_not(networks, kind):
    work = Work((Story("a"), Story("b")), (0, 1))
    batch = dataclasses.replace(
        batch_of(None, work, videos()), models={"temporal_consistency": str(networks / kind)}
    )
    table = METRICS["temporal_consistency"].measure(batch)
    assert table["consistency"][1] == pytest.approx(1, abs=1e-5)
    assert table["consistency"][0] < 1 - 1e-4
    assert table["windows.first"].shape == (2, 1)


def test_pictures_are_prepared_as_the_directory_says(networks):
    prepare = features.Preparation.read(networks / "clip/preprocessor_config.json")
    wide = np.zeros((1, 16, 32, 3), np.uint8)
    wide[:, :, 8:24] = 255  # the square in the middle is white
    prepared = prepare(wide)
    assert prepared.shape == (1, 3, 16, 16)
    np.testing.assert_allclose(prepared, 2.0)


def test_missing_networks_are_refused(networks, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a network"):
        features._clip(str(tmp_path))
    with pytest.raises(UserError, match="no size, image_mean"):
        features.Preparation.read(tmp_path / "preprocessor_config.json")


def test_frames_of_a_segment_are_spread():
    assert features.spread(0, 80).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    assert features.spread(10, 13).tolist() == [10, 11, 12]
