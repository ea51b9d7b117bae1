"""A pipeline small enough that most of a test is not compilation, without a text encoder."""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import preset
from longlive_jax.config_dict import override
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.inference.pipeline import Pipeline

SMALL = {
    "vae.num_res_blocks": 1,
    "vae.dim_mult": (1, 1, 1, 1),
    "sampler.steps": (1000,),
    "video.height": 16,
    "video.width": 16,
    "window.rope": "relative",
}


@functools.cache
def small_pipeline() -> Pipeline:
    """Random weights in a shape like the preset "tiny"; equal calls share everything compiled."""
    config = override(preset("tiny"), SMALL)
    random = np.random.default_rng(0)

    def draw(spec: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = np.prod(spec.shape[:-1]) if len(spec.shape) > 1 else 1
        return jnp.asarray((random.normal(size=spec.shape) / np.sqrt(fan_in)).astype(np.float32))

    params, vae_params = (jax.tree.map(draw, expected_tree(part, config)) for part in ("transformer", "vae"))
    return Pipeline(config, params, vae_params, _embed)


def _embed(prompts: Sequence[str]) -> jax.Array:
    """Embeddings that differ from prompt to prompt, in shape and zeros like the text encoder's."""
    rows = np.zeros((len(prompts), 16, 32), np.float32)
    for row, prompt in zip(rows, prompts, strict=True):
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
        row[: min(len(prompt.split()) + 1, 16)] = np.random.default_rng(seed).normal(size=(1, 32))
    return jnp.asarray(rows)
