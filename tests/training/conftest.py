"""What the tests of the trainer share: a checkpoint to start from, and programs that compile fast."""

import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from longlive_jax import checkpoint
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.models.tokenizer import train_word_tokenizer
from longlive_jax.training import world as worlds
from longlive_jax.training.config_file import load_config
from tests.training._runs import CONFIGS, only_one_device


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of the smoke model with random weights in every part."""
    folder, random = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    model = load_config(CONFIGS / "causal_init.py", {"smoke": "true"}).model

    def draw(spec):
        fan_in = np.prod(spec.shape[-2:-1]) if len(spec.shape) > 1 else 100
        return (random.normal(size=spec.shape) / np.sqrt(fan_in)).astype(np.float32)

    tokenizer = train_word_tokenizer(worlds.caption_table(), vocab_size=32, path=folder / "t.json")
    with checkpoint.create(folder / "base", model, source={"made": "for tests"}) as writer:
        for part in ("transformer", "text_encoder", "vae"):
            writer.add_tree(part, jax.tree.map(draw, expected_tree(part, model)))
        writer.add_tokenizer(tokenizer)
    return folder / "base"


@pytest.fixture(scope="session")
def _cache_folder(tmp_path_factory):
    """One for all processes of the test run."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "xla"


@pytest.fixture(scope="module")
def fast_programs(_cache_folder):
    """Programs are compiled with little optimisation, and once: they run for seconds only.

    Processes that a test starts do the same.
    """
    values = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(_cache_folder),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: jax.config.values[name] for name in values}
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device():
    """See `only_one_device`."""
    with only_one_device():
        yield
