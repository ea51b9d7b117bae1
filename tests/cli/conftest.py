"""A complete tiny checkpoint with random weights, and a clean place to run commands in."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.cli.main import main
from longlive_jax.config import preset
from longlive_jax.config_dict import override
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.models.tokenizer import train_word_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A checkpoint directory of (nearly) the preset "tiny"."""
    folder = tmp_path_factory.mktemp("tiny")
    # A shallower VAE than the preset's: most of a run this small is compilation.
    config = override(preset("tiny"), {"vae.num_res_blocks": 1, "vae.dim_mult": (1, 1, 1, 1)})
    generator = np.random.default_rng(0)

    def draw(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = np.prod(spec.shape[:-1]) if len(spec.shape) > 1 else 1
        return (generator.normal(size=spec.shape) / np.sqrt(fan_in)).astype(np.float32)

    # Drawn with numpy: initialising through flax would compile three models.
    parts = {
        part: jax.tree.map(draw, expected_tree(part, config))
        for part in ("transformer", "text_encoder", "vae")
    }
    tokenizer = train_word_tokenizer(
        ["a red fox runs through deep snow", "the fox stops"], vocab_size=64, path=folder / "t.json"
    )
    with checkpoint.create(folder / "tiny", config, source={"made": "for tests"}) as writer:
        for part, params in parts.items():
            writer.add_tree(part, params)
        writer.add_tokenizer(tokenizer)
    return folder / "tiny"


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@dataclasses.dataclass
class Result:
    """What one command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def longlive(tmp_path, monkeypatch, capsys, cache_dir):
    """Runs `longlive WORDS...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_CACHE", str(cache_dir))

    def run(*words: object) -> Result:
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return run


@pytest.fixture
def refused(longlive):
    """Runs a command that must fail with one line and status 2; returns the line."""

    def run(*words: object) -> str:
        result = longlive(*words)
        assert result.status == 2, result
        assert result.out == ""
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        return result.err

    return run
