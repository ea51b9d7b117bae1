"""The 8-bit transformer built on qwix against the one in `longlive_jax.quantize`, same weights and inputs.

    pip install qwix
    python -m benchmarks.quantize_qwix

Two layers of wan_1_3b's width with random weights. Of both: the shapes and precision of the scales on the
layer-stacked tree, the error of one pass against float32, the matrix products in the program lowered for a
GPU, seconds to trace and lower it, seconds to run it, and whether two equal models share compilations.
"""

import argparse
import collections
import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from longlive_jax.checkpoint import flatten
from longlive_jax.config import WAN_1_3B, TransformerConfig
from longlive_jax.models.transformer import Transformer, init_params
from longlive_jax.quantize import tree
from longlive_jax.quantize.module import quantized

LAYER = ("blocks", "self_attn", "q")


def random_params(transformer: Transformer, dtype: Any) -> Any:
    """Normal weights of the usual spread (drawing them beats compiling the initialisers)."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spread = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.02
        value = spread * random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(value + (path[-1].key == "scale"), dtype)

    shapes = jax.eval_shape(lambda key: init_params(transformer, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def forward(module: Any) -> Callable[..., jax.Array]:
    """One pass with its text, as a function of (params, latents, text)."""

    @jax.jit
    def run(params: Any, latents: jax.Array, text: jax.Array) -> jax.Array:
        context = module.apply({"params": params}, text, method="text_context")
        return module.apply({"params": params}, latents, jnp.full((1, 1), 625.0), context)[0]

    return run


def with_qwix(transformer: Transformer, params: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Module, parameters and remarks of qwix's post-training quantisation of the blocks."""
    import qwix

    rules = [
        qwix.QuantizationRule(
            module_path=r"blocks/(self_attn|cross_attn)/[qkvo]|blocks/ffn/fc[12]",
            op_names=("dot_general",),
            weight_qtype=jnp.int8,
            act_qtype=jnp.int8,
        )
    ]

    def make() -> Any:
        methods = ("__call__", "text_context", "create")
        return qwix.quantize_model(transformer, qwix.PtqProvider(rules), methods=methods)

    module = make()
    abstract = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    stacked = qwix.quantize_params(params, abstract)

    def at(found: Any) -> Any:
        return functools.reduce(lambda node, key: node[key], LAYER, found)["kernel"]

    # As quantize_params makes one scale for all layers: each layer alone, put together again.
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), abstract["blocks"])
    blocks = jax.vmap(lambda p: qwix.quantize_params(p, one))(params["blocks"])
    rest = {name: value for name, value in params.items() if name != "blocks"}
    repaired = {**rest, "blocks": blocks}
    return (
        module,
        repaired,
        {
            "scale_shape_from_quantize_params": list(at(stacked).array.scale.shape),
            "scale_shape_layer_by_layer": list(at(repaired).array.scale.shape),
            "scale_dtype": str(at(repaired).array.scale.dtype),
            "equal_models_share_compilations": make() == make(),
            "leaf": type(at(repaired)).__name__,
        },
    )


def with_ours(transformer: Transformer, params: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The same, of `longlive_jax.quantize`."""
    module, found = quantized(transformer, "int8"), tree.quantize_tree(params, "int8")
    scale = flatten(found)["/".join((*LAYER, tree.SCALE))]
    return (
        module,
        found,
        {
            "scale_shape": list(scale.shape),
            "scale_dtype": str(scale.dtype),
            "equal_models_share_compilations": quantized(transformer, "int8") == module,
            "leaf": "array",
        },
    )


def products(text: str) -> dict[str, int]:
    """How many matrix products of each kind a lowered program holds."""
    tensor = r"tensor<(?:\d+x)*(\w+)>"
    found = re.findall(rf"dot_general .*: \({tensor}, {tensor}\) -> {tensor}", text)
    return dict(collections.Counter(f"{a} x {b} -> {c}" for a, b, c in found))


def measure(make: Callable[..., Any], transformer: Transformer, params: Any) -> dict[str, Any]:
    """Everything about one implementation, with its result and a call that runs it again."""
    module, found, remarks = make(transformer, params)
    config = transformer.config
    random = np.random.default_rng(1)
    latents = jnp.asarray(random.standard_normal((1, 3, 8, 8, 16)), jnp.float32)
    text = jnp.asarray(random.standard_normal((1, config.text_len, config.text_dim)), jnp.float32)
    run, started = forward(module), time.perf_counter()
    lowered = run.trace(found, latents, text).lower(lowering_platforms=("cuda",)).as_text()
    seconds = time.perf_counter() - started
    return {
        **remarks,
        "products_lowered_for_cuda": products(lowered),
        "trace_and_lower_seconds": round(seconds, 2),
        "result": np.asarray(run(found, latents, text)),
        "again": lambda: run(found, latents, text).block_until_ready(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dim", type=int, default=WAN_1_3B.dim, help="a smaller width, for a try")
    arguments = parser.parse_args()
    small = dataclasses.replace(WAN_1_3B, num_layers=2, text_len=64)
    if arguments.dim != WAN_1_3B.dim:
        small = TransformerConfig(dim=arguments.dim, ffn_dim=4 * arguments.dim, num_heads=4, num_layers=2)
    transformer = Transformer(small, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = random_params(transformer, jnp.bfloat16)
    exact = Transformer(small)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    found = {
        "float32": measure(lambda t, p: (exact, wide, {}), exact, wide),
        "bfloat16": measure(lambda t, p: (t, p, {}), transformer, params),
        "qwix": measure(with_qwix, transformer, params),
        "ours": measure(with_ours, transformer, params),
    }
    again = {name: one.pop("again") for name, one in found.items()}
    truth = found["float32"].pop("result")
    for name in ("bfloat16", "qwix", "ours"):
        error = found[name].pop("result") - truth
        found[name]["relative_error"] = float(np.linalg.norm(error) / np.linalg.norm(truth))
    timed = {
        other: common.side_by_side(again["ours"], again[other], repeats=arguments.repeats)
        for other in ("qwix", "bfloat16")
    }
    result = {"what": __doc__.splitlines()[0], "dim": small.dim, **found, "ours_side_by_side_with": timed}
    common.save("quantize_qwix", result)


if __name__ == "__main__":
    main()
