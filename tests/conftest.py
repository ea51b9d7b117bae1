"""Shared test settings: CPU only, eight simulated devices, no cache outside the test folder."""

import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = [os.environ.get("XLA_FLAGS", "")]
if "xla_force_host_platform_device_count" not in flags[0]:
    flags.append("--xla_force_host_platform_device_count=8")
# Loops emitted without MLIR compile a quarter faster. (XLA ends a process at a flag that it does not know.)
known = importlib.metadata.version("jaxlib").startswith("0.10.")
if known and os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

MOST_MAPPINGS = 16_000
"""Of a process, between two files: a quarter of what Linux allows by default (vm.max_map_count). Beyond that,
XLA's compiler ends the process by a segmentation fault."""


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A complete checkpoint of the `tiny` preset: random weights and a word tokenizer."""
    import jax
    import numpy as np

    from longlive_jax import checkpoint
    from longlive_jax.config import preset
    from longlive_jax.inference import parts
    from longlive_jax.models import text_encoder, transformer, vae
    from longlive_jax.models.tokenizer import train_word_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints")
    config, random = preset("tiny"), np.random.default_rng(0)

    def drawn(init, module):
        """Random values in the shapes of `init` (drawing them beats compiling the initialisers)."""

        def draw(path, leaf):
            spread = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1
            value = spread * random.standard_normal(leaf.shape, np.float32)
            return value + 1 if path[-1].key == "scale" else value

        shapes = jax.eval_shape(lambda key: init(module, key), jax.random.key(0))
        return jax.tree_util.tree_map_with_path(draw, shapes)

    words = ["a red circle moves left right", "a blue square stays on a dark background"]
    tokenizer = train_word_tokenizer(words, vocab_size=64, path=folder / "tokenizer.json")
    with checkpoint.create(folder / "tiny", config, source={"made_for": "tests"}) as out:
        out.add_tree("transformer", drawn(transformer.init_params, parts.transformer_of(config)))
        out.add_tree("text_encoder", drawn(text_encoder.init_params, parts.text_encoder_of(config)))
        out.add_tree("vae", drawn(vae.init_params, parts.vae_of(config)))
        out.add_tokenizer(tokenizer)
    return folder / "tiny"


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompt embeddings and compiled programs of the tests stay out of the user's cache."""
    os.environ["LONGLIVE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Forgets all compiled programs when their memory mappings (three of each kernel) have become many."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
