"""A complete checkpoint of the toy recipe's smoke model, with random weights."""

import pathlib

import jax
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.models.tokenizer import train_word_tokenizer
from longlive_jax.training import world as worlds
from longlive_jax.training.config_file import load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs/toy"


@pytest.fixture(scope="session")
def smoke_checkpoint(tmp_path_factory):
    """Makes a checkpoint directory from a seed and more `source` entries."""
    folder = tmp_path_factory.mktemp("smoke")
    model = load_config(CONFIGS / "causal_init.py", {"smoke": "true"}).model
    tokenizer = train_word_tokenizer(worlds.caption_table(), vocab_size=32, path=folder / "t.json")

    def make(seed=0, **source):
        random = np.random.default_rng(seed)

        def draw(spec):
            fan_in = np.prod(spec.shape[-2:-1]) if len(spec.shape) > 1 else 100
            return (random.normal(size=spec.shape) / np.sqrt(fan_in)).astype(np.float32)

        path = folder / f"smoke-{seed}"
        about = {"stage": "long", "steps": 10, "seed": 3, "base": "/somewhere/init/export", **source}
        with checkpoint.create(path, model, source=about, overwrite=True) as writer:
            for part in ("transformer", "text_encoder", "vae"):
                writer.add_tree(part, jax.tree.map(draw, expected_tree(part, model)))
            writer.add_tokenizer(tokenizer)
        return path

    return make
