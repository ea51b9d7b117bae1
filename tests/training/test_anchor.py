"""The linear code that ties an autoencoder's latents, and the autoencoder's stage that uses it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from longlive_jax import checkpoint, toy
from longlive_jax.config import preset
from longlive_jax.training import anchor, stages
from longlive_jax.training.stages import vae as vae_stage
from tests.training._runs import smoke

CONFIG = preset("toy").vae
WORLD = toy.World()


@pytest.fixture(scope="module")
def code():
    return anchor.fit(WORLD, CONFIG, clips=128, seed=3)


def rendered(frames, count=16):
    scenes = toy.sample_scenes(WORLD, seed=5, indices=np.arange(count))
    return scenes, toy.render(WORLD, scenes, frames=frames)


def test_code_has_the_latents_shape_and_scale(code):
    _, video = rendered(9, 96)
    found = np.asarray(code(video, CONFIG))
    assert found.shape == (96, 3, 8, 8, 16)
    assert 0.85 < np.mean(np.square(found)) < 1.15
    deviation = found.reshape(-1, 16).std(0)
    assert deviation.max() < 2.5 * deviation.min()  # the random basis spreads the components


def test_code_is_of_the_last_frame_of_every_group(code):
    _, video = rendered(9)
    for latent, frame in enumerate((0, 4, 8)):
        alone = code(video[:, frame : frame + 1], CONFIG)
        np.testing.assert_array_equal(np.asarray(alone)[:, 0], np.asarray(code(video, CONFIG))[:, latent])


def test_code_keeps_what_a_reader_needs(code):
    scenes, video = rendered(1, 64)
    inverse = np.linalg.pinv(code.projection)
    cells = np.asarray(code(video, CONFIG))[:, 0] @ inverse + code.mean  # [B, 8, 8, 192]
    frames = cells.reshape(64, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(64, 1, 64, 64, 3)
    assert 10 * np.log10(4 / np.mean(np.square(frames - np.asarray(video)))) > 28
    readings = toy.read(WORLD, np.clip(frames, -1, 1))
    right = readings.codes[:, 0, [0, 1, 3]] == scenes.codes[:, [0, 1, 3]]
    assert right.mean() > 0.97


def test_code_is_the_same_for_the_same_seed_and_spans_few_pixels(code):
    again = anchor.fit(WORLD, CONFIG, clips=128, seed=3)
    np.testing.assert_array_equal(code.projection, again.projection)
    narrow = dataclasses.replace(CONFIG, dim_mult=(1, 1), temporal_downsample=(True,))  # cells of 12 values
    assert anchor.fit(WORLD, narrow, clips=4, seed=0).projection.shape == (12, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_programs", "one_device")
def test_anchor_pulls_the_latents_and_the_decoder_stage_leaves_them(tmp_path):
    config = smoke("vae_images", None, tmp_path / "images", run__steps=24, optimizer__learning_rate=1e-2)
    report = stages.train(config, is_quiet=True)
    lines = (tmp_path / "images/metrics.jsonl").read_text().splitlines()
    distances = [row["anchor"] for row in map(json.loads, lines) if "anchor" in row]
    assert len(distances) == 24
    assert distances[-1] < 0.75 * distances[0]
    base = report["export"]
    decoder = smoke("vae_decoder", base, tmp_path / "decoder")
    after = checkpoint.open_checkpoint(stages.train(decoder, is_quiet=True)["export"]).load("vae")
    before = checkpoint.open_checkpoint(base).load("vae")
    for part in before:
        same = jax.tree.map(np.array_equal, before[part], after[part])
        assert all(jax.tree.leaves(same)) == (part in vae_stage.ENCODER), part
