"""`longlive generate --vae --vae-tile`: a small autoencoder from another checkpoint, in tiles."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.torch

from longlive_jax import checkpoint, video
from longlive_jax.config import LIGHT_VAE, TAEW2_1
from longlive_jax.config_dict import override
from longlive_jax.convert.export import export
from longlive_jax.convert.shapes import expected_tree
from tests.convert import sources

WORDS = ("--frames", 4, "--quiet", "--prompt", "a red fox runs")


@pytest.fixture(scope="module")
def small(tiny_checkpoint, tmp_path_factory) -> pathlib.Path:
    """A checkpoint that holds a narrow TAEHV and nothing else."""
    config = checkpoint.open_checkpoint(tiny_checkpoint).config
    config = dataclasses.replace(config, vae=override(TAEW2_1, {"dim": 4, "num_res_blocks": 1}))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * random.standard_normal(leaf.shape, np.float32), expected_tree("vae", config)
    )
    path = tmp_path_factory.mktemp("small") / "small"
    with checkpoint.create(path, config, source={"made": "for tests"}) as writer:
        writer.add_tree("vae", params)
    return path


def test_a_small_autoencoder_decodes_and_is_recorded(longlive, tiny_checkpoint, small):
    words = ("generate", "--checkpoint", tiny_checkpoint, *WORDS, "--vae", small, "--vae-tile", 16)
    result = longlive(*words, "--out", "v/")
    assert result.status == 0, result.err
    request = json.loads(pathlib.Path("v.json").read_text())["request"]
    assert (request["vae"], request["overrides"]["vae_tile"]) == (str(small), 16)
    frames = video.read_video("v/")
    assert frames.shape == (13, 32, 48, 3)
    assert np.ptp(frames) > 50
    again = longlive("generate", "--from", "v.json", "--out", "again/", "--quiet")
    assert again.status == 0, again.err
    np.testing.assert_array_equal(video.read_video("again/"), frames)


@pytest.mark.parametrize(
    ("vae", "name"), [(TAEW2_1, "taew2_1.safetensors"), (LIGHT_VAE, "lightvaew2_1.safetensors")]
)
def test_a_file_of_the_published_layout_converts_and_decodes(vae, name, longlive, tiny_checkpoint, tmp_path):
    """At full size, with random weights: names and shapes are those of the published files."""
    config = dataclasses.replace(checkpoint.open_checkpoint(tiny_checkpoint).config, vae=vae)
    with checkpoint.create(tmp_path / "ours", config, source={"made": "for tests"}) as writer:
        writer.add_tree("vae", sources.random_tree("vae", config))
    export(tmp_path / "ours", tmp_path / "theirs", layout="wan")
    [file] = (tmp_path / "theirs").glob("*.pth")
    safetensors.torch.save_file(sources.state_dict(file), name)

    result = longlive("convert", name, "small")
    assert result.status == 0, result.err
    assert checkpoint.open_checkpoint("small").config.vae == vae
    for small in ("small", "ours"):
        result = longlive(
            "generate", "--checkpoint", tiny_checkpoint, *WORDS, "--vae", small, "--out", f"{small}-frames/"
        )
        assert result.status == 0, result.err
    frames = video.read_video("small-frames/")
    np.testing.assert_array_equal(frames, video.read_video("ours-frames/"))
    assert frames.shape == (13, 32, 48, 3)
    assert np.ptp(frames) > 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vae", "absent"), "--vae=absent is no checkpoint directory (no config.json); make one with"),
        (("--vae-tile", 8), "vae_tile=8 must be at least 16, or 0 for whole frames"),
    ],
)
def test_what_cannot_be_decoded_with_is_refused(longlive, tiny_checkpoint, words, message):
    result = longlive("generate", "--checkpoint", tiny_checkpoint, *WORDS, *words)
    assert result.status != 0
    assert message in result.err
