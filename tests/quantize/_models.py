"""A small transformer with weights like those of real ones: normal, with some outlier channels."""

import jax
import numpy as np

from longlive_jax.config import SamplerConfig, TransformerConfig, WindowConfig
from longlive_jax.inference import rollout
from longlive_jax.models.transformer import Transformer, init_params

CONFIG = TransformerConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=32, text_dim=16, text_len=8, latent_channels=4
)
MODEL = Transformer(CONFIG)
SIZE = (8, 8)
RECIPES = ("int8", "int8-rotated", "int8-weight-only", "fp8", "fp8-weight-only")


def random_params(model=MODEL, seed=0):
    """Drawn with numpy: compiling the initialisers takes longer."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.1
        value = spread * random.standard_normal(leaf.shape, np.float32)
        return jax.numpy.asarray(value + (path[-1].key == "scale"))

    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def generator(model=MODEL, *, cache_dtype="same", rope="absolute", steps=(1000,)):
    return rollout.Generator(
        model, WindowConfig(9, 3, 3, rope), SamplerConfig(steps=steps), cache_dtype=cache_dtype
    )


def begin(gen, params, *, batch=1, seed=3):
    text = np.random.default_rng(seed).standard_normal((batch, CONFIG.text_len, CONFIG.text_dim), np.float32)
    return rollout.init(gen, params, text, np.arange(batch, dtype=np.uint32), latent_size=SIZE)
