"""Latents of a quantised model against those in float32: two layers of wan_1_3b's width, random weights.

    python -m benchmarks.quantize_error

Every variant makes the same video of 18 latent frames (window 9: the cache wraps around). The error is
|found - exact| / |exact|, over all frames, the first six and the last six. The model computes in float32, so
that nothing but the 8 bits differs; bfloat16 without any is the yardstick. Then the error of every linear
layer, as `longlive verify --layers` prints it.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.quantize_speed import draw
from longlive_jax.config import WAN_1_3B, CacheDType, Recipe, SamplerConfig, WindowConfig
from longlive_jax.inference import rollout
from longlive_jax.models.transformer import Transformer, init_params
from longlive_jax.quantize import tree
from longlive_jax.quantize.errors import layer_table, random_inputs
from longlive_jax.quantize.module import quantized

BLOCKS, ENDS = 6, 6
WINDOW = WindowConfig(window_frames=9, sink_frames=3, block_frames=3)
LATENT_SIZE, TEXT_LEN = (8, 8), 64

VARIANTS: dict[str, tuple[Recipe, CacheDType]] = {
    "int8": ("int8", "same"),
    "int8-weight-only": ("int8-weight-only", "same"),
    "fp8": ("fp8", "same"),
    "fp8-weight-only": ("fp8-weight-only", "same"),
    "int8 cache": ("none", "int8"),
    "fp8 cache": ("none", "fp8"),
    "int8, int8 cache": ("int8", "int8"),
}


def latents(transformer: Transformer, params: Any, cache: CacheDType, blocks: int) -> np.ndarray:
    """Float32 latents `[1, F, h, w, C]` of one video."""
    generator = rollout.Generator(transformer, WINDOW, SamplerConfig(), cache_dtype=cache)
    config = transformer.config
    text = np.random.default_rng(1).standard_normal((1, config.text_len, config.text_dim), np.float32)
    state = rollout.init(generator, params, text, np.zeros(1, np.uint32), latent_size=LATENT_SIZE)
    found = []
    for _ in range(blocks):
        state, block = rollout.step(generator, params, state)
        found.append(np.asarray(block))
    return np.concatenate(found, axis=1)


def relative(found: np.ndarray, exact: np.ndarray, frames: slice) -> float:
    difference = np.linalg.norm(found[:, frames] - exact[:, frames])
    return round(float(difference / np.linalg.norm(exact[:, frames])), 5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    arguments = parser.parse_args()
    config = dataclasses.replace(WAN_1_3B, num_layers=arguments.layers, text_len=TEXT_LEN)
    plain = Transformer(config)
    shapes = jax.eval_shape(lambda key: init_params(plain, key), jax.random.key(0))
    params = draw(shapes, "float32", seed=0)
    made: dict[Recipe, Any] = {"none": params}
    for recipe in ("int8", "fp8"):
        made[recipe] = jax.jit(tree.quantize_tree, static_argnames="recipe")(params, recipe=recipe)
        made[f"{recipe}-weight-only"] = made[recipe]  # only the products differ
    exact = latents(plain, params, "same", arguments.blocks)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    results = {
        "bfloat16": latents(Transformer(config, dtype=jnp.bfloat16), rounded, "same", arguments.blocks)
    }
    for name, (recipe, cache) in VARIANTS.items():
        results[name] = latents(quantized(plain, recipe), made[recipe], cache, arguments.blocks)
        print(name, relative(results[name], exact, slice(None)), flush=True)
    tables = {
        recipe: str(layer_table(plain, params, made[recipe], recipe=recipe, inputs=random_inputs(config)))
        for recipe in ("int8", "fp8")
    }
    errors = {
        name: {
            "all_frames": relative(found, exact, slice(None)),
            "first_frames": relative(found, exact, slice(0, ENDS)),
            "last_frames": relative(found, exact, slice(-ENDS, None)),
        }
        for name, found in results.items()
    }
    about = {
        "what": __doc__.splitlines()[0],
        "dim": config.dim,
        "layers": arguments.layers,
        "frames": exact.shape[1],
        "frames_of_an_end": ENDS,
        "latent_size": LATENT_SIZE,
        "text_len": TEXT_LEN,
        "window_frames": WINDOW.window_frames,
        "sink_frames": WINDOW.sink_frames,
        "block_frames": WINDOW.block_frames,
    }
    common.save("quantize_error", {**about, "relative_error_of_latents": errors, "layers_table": tables})


if __name__ == "__main__":
    main()
