"""The block step in 8 bits against the plain one, side by side in one run, random weights.

    python -m benchmarks.quantize_speed                                  toy, and wan_1_3b cut to 2 layers
    python -m benchmarks.quantize_speed --model wan_1_3b --decode --name gpu                      on a GPU

Every variant generates blocks (four denoising passes and the clean one) over a full window. The variants take
turns, A B C A B C, after the untimed blocks that fill the window; ratios are taken round by round against the
first, the model in its own precision. With --decode the VAE decodes every block: the end-to-end rate.
`products` counts the matrix products of the compiled program by the type of their operands.
"""

import argparse
import collections
import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from longlive_jax.config import PRESETS, PipelineConfig
from longlive_jax.config_dict import override
from longlive_jax.inference.parts import transformer_of, vae_of
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.memory import tree_bytes
from longlive_jax.models import transformer as transformer_lib
from longlive_jax.models import vae as vae_lib
from longlive_jax.quantize import tree

VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    "int8": {"quantization": "int8"},
    "int8, int8 cache": {"quantization": "int8", "cache_dtype": "int8"},
    "int8-weight-only": {"quantization": "int8-weight-only"},
    "fp8": {"quantization": "fp8"},
    "int8 cache": {"cache_dtype": "int8"},
}
FILLING_BLOCKS = 5
SMALL = {"toy": ((8, 8), None), "wan_1_3b": ((16, 16), 2)}
"""What runs without --model: latent size and number of layers (None: all)."""


def draw(shapes: Any, dtype: str, *, seed: int) -> Any:
    """Random weights of the usual spread, in `dtype`, drawn where they live."""
    numbers = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def drawn(key: jax.Array, shape: tuple[int, ...], spread: float, middle: float) -> jax.Array:
        def part(key: jax.Array) -> jax.Array:  # layer by layer: all at once would be float32 for a moment
            return (middle + spread * jax.random.normal(key, shape[1:])).astype(dtype)

        return jax.lax.map(part, jax.random.split(key, shape[0]))

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        fan_in = np.prod(leaf.shape[-4:-1]) if leaf.ndim > 3 else leaf.shape[-2] if leaf.ndim > 1 else 1
        spread = float(fan_in) ** -0.5 if name == "kernel" else 0.02
        return drawn(next(numbers), leaf.shape, spread, float(name in ("scale", "gamma")))

    return jax.tree_util.tree_map_with_path(one, shapes)


def pipelines(config: PipelineConfig, *, decodes: bool, names: list[str]) -> dict[str, Pipeline]:
    """One pipeline per variant, all of the same random weights."""
    init = transformer_lib.init_params
    shapes = jax.eval_shape(lambda key: init(transformer_of(config), key), jax.random.key(0))
    params = draw(shapes, config.dtype, seed=0)
    vae_params = None
    if decodes:
        vae_shapes = jax.eval_shape(lambda key: vae_lib.init_params(vae_of(config), key), jax.random.key(0))
        vae_params = draw(vae_shapes, config.dtype, seed=1)
    found, made = {}, {"none": params}
    for name in names:
        variant = override(config, VARIANTS[name])
        recipe = variant.quantization
        if recipe not in made:
            made[recipe] = jax.jit(tree.quantize_tree, static_argnames="recipe")(params, recipe=recipe)
        found[name] = Pipeline(variant, made[recipe], vae_params, lambda prompts: jnp.zeros(()))
    return found


def runner(pipe: Pipeline, size: tuple[int, int], *, decodes: bool) -> tuple[Callable[[], None], Any]:
    """A call that makes the next block of a running video, and the state it starts with."""
    shape, stride = pipe.config.transformer, pipe.config.vae.spatial_stride
    text = np.random.default_rng(2).standard_normal((1, shape.text_len, shape.text_dim), np.float32)
    state = pipe.begin(
        jnp.asarray(text, jnp.dtype(pipe.config.dtype)),
        np.zeros(1, np.uint32),
        height=size[0] * stride,
        width=size[1] * stride,
        decodes=decodes,
    )
    held = [state]

    def block() -> None:
        held[0], latents, pixels = pipe.advance(held[0])
        jax.block_until_ready((latents, pixels))

    return block, state.rollout


def products(pipe: Pipeline, state: Any) -> dict[str, int]:
    """Matrix products of the compiled block step, by the types of their operands."""
    from longlive_jax.inference import rollout

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (pipe.params, state))
    program = rollout.step.lower(pipe.generator, *shapes).compile().as_text()
    types: dict[str, str] = {}
    found: collections.Counter[str] = collections.Counter()
    for line in program.splitlines():
        if line.endswith("{"):  # names are those of one computation
            types = {}
        types |= dict(re.findall(r"(%[\w.-]+) = (\w+)\[", line))
        if " dot(" not in line and not re.search(
            r'custom_call_target="__cublas|__triton_gemm|"__cudnn', line
        ):
            continue
        call = re.search(r" (?:dot|custom-call|fusion)\(([^)]*)\)", line)
        if call:
            operands = [types.get(name, "?") for name in re.findall(r"%[\w.-]+", call[1])][:2]
            found[" x ".join(operands)] += 1
    return dict(found)


def measure(config: PipelineConfig, arguments: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """Times all variants of one model in turn."""
    pipes = pipelines(config, decodes=arguments.decode, names=arguments.variants)
    found: dict[str, dict[str, Any]] = {}
    blocks: dict[str, Callable[[], None]] = {}
    for name, pipe in pipes.items():
        blocks[name], state = runner(pipe, size, decodes=arguments.decode)
        found[name] = {
            "weights_mb": round(tree_bytes(pipe.params) / 1e6, 2),
            "cache_mb": round(tree_bytes(state.cache) / 1e6, 2),
            "products": products(pipe, state),
        }
        for _ in range(FILLING_BLOCKS):
            blocks[name]()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(arguments.repeats):
        for name, block in blocks.items():
            started = time.perf_counter()
            block()
            seconds[name].append(time.perf_counter() - started)
    first = arguments.variants[0]
    video_frames = config.window.block_frames * config.vae.temporal_stride
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], times, strict=True)]
        found[name]["block_seconds"] = common.summary(times)
        found[name]["times_as_fast_as_the_first"] = common.summary(ratios)
        found[name]["video_frames_per_second"] = round(video_frames / statistics.median(times), 2)
        print(config.name, name, found[name], flush=True)
    return {
        "layers": config.transformer.num_layers,
        "dtype": config.dtype,
        "latent_size": size,
        "decodes": arguments.decode,
        "variants": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=sorted(PRESETS), help="one preset in full (default: two small ones)"
    )
    parser.add_argument("--size", type=int, nargs=2, help="latent rows and columns (default: the preset's)")
    parser.add_argument("--layers", type=int, help="cut the transformer to so many layers")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--decode", action="store_true", help="decode every block with the VAE")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", default="cpu", help="suffix of the result's file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # What `products` compiles is what is timed: without a cache everything would be compiled twice.
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", folder)
        models = run(arguments)
    common.save(f"quantize_speed_{arguments.name}", {"what": __doc__.splitlines()[0], "models": models})


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the chosen models."""
    models = {}
    for name in [arguments.model] if arguments.model else list(SMALL):
        config = PRESETS[name]
        size, layers = config.latent_size(config.video.height, config.video.width), None
        if not arguments.model:
            size, layers = SMALL[name]
        size, layers = tuple(arguments.size or size), arguments.layers or layers
        if layers:
            config = dataclasses.replace(
                config, transformer=dataclasses.replace(config.transformer, num_layers=layers)
            )
        models[name] = measure(config, arguments, size)
    return models


if __name__ == "__main__":
    main()
