"""The wan_1_3b block step: compile time by depth, and peak memory of a run with random bfloat16 weights.

    python -m benchmarks.block_step

The layers are scanned, so the compile time should not grow with their number. The run uses a small
frame so that it fits a laptop; the memory is the process's high-water mark.
"""

import argparse
import dataclasses
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from longlive_jax.config import WAN_1_3B, SamplerConfig, TransformerConfig, WindowConfig
from longlive_jax.inference import rollout
from longlive_jax.models.transformer import Transformer, init_params

GIB = 2**30


def generator_of(config: TransformerConfig) -> rollout.Generator:
    return rollout.Generator(Transformer(config, dtype=jnp.bfloat16), WindowConfig(), SamplerConfig())


def shapes_of(generator: rollout.Generator, size: tuple[int, int]) -> tuple:
    """Shapes of (params, state) with everything in bfloat16 that is stored so."""
    config = generator.transformer.config
    params = jax.eval_shape(lambda key: init_params(generator.transformer, key), jax.random.key(0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16)
    seeds = jax.ShapeDtypeStruct((1,), jnp.uint32)
    state = jax.eval_shape(lambda p, t, s: generator.init(p, t, s, latent_size=size), params, text, seeds)
    return params, state


def compile_seconds(layers: int, size: tuple[int, int], repeats: int) -> list[float]:
    """Seconds to trace, lower and compile the step, from nothing each time."""
    generator = generator_of(dataclasses.replace(WAN_1_3B, num_layers=layers))
    params, state = shapes_of(generator, size)
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        rollout.step.lower(generator, params, state).compile()
        seconds.append(round(time.perf_counter() - start, 2))
    return seconds


def run_once(size: tuple[int, int]) -> dict:
    """Runs two block steps with random weights and reports seconds and memory."""
    generator = generator_of(WAN_1_3B)
    params_shape, _ = shapes_of(generator, size)
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # One layer at a time: a float32 copy of a whole stack would be the peak.
        rows = [
            (0.02 * random.standard_normal(leaf.shape[1:], np.float32)).astype(jnp.bfloat16)
            for _ in range(leaf.shape[0])
        ]
        return jnp.asarray(np.stack(rows))

    params = jax.tree.map(draw, params_shape)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    config = WAN_1_3B
    text = jnp.zeros((1, config.text_len, config.text_dim), jnp.bfloat16)
    state = rollout.init(generator, params, text, np.zeros(1, np.uint32), latent_size=size)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        state, latents = rollout.step(generator, params, state)
        latents.block_until_ready()
        seconds.append(round(time.perf_counter() - start, 2))
    assert np.isfinite(np.asarray(latents)).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "latent_size": size,
        "weights_gib": round(weights / GIB, 3),
        "state_gib": round(held / GIB, 3),
        "peak_process_gib": round(peak / GIB, 3),
        "seconds_first_with_compilation_then_next": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=(8, 8), help="latent rows and columns")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    size = tuple(arguments.size)
    ran = run_once(size)  # first: the process's high-water mark must be its own
    compiled = {layers: compile_seconds(layers, size, arguments.repeats) for layers in (2, 30)}
    ratio = statistics.median(compiled[30]) / statistics.median(compiled[2])
    result = {
        "what": "wan_1_3b, bfloat16, window 12, sink 3, block 3, 4 denoising passes and the clean pass",
        "compile_seconds_by_layers": compiled,
        "compile_ratio_30_to_2_layers": round(ratio, 2),
        "run": ran,
    }
    if arguments.no_save:
        print(result)
    else:
        common.save("block_step", result)


if __name__ == "__main__":
    main()
