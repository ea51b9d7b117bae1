"""The quantised transformer: its tree, its error, and the products that a GPU would run."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.checkpoint import flatten
from longlive_jax.config import PRESETS
from longlive_jax.config_dict import override
from longlive_jax.inference import rollout
from longlive_jax.inference.parts import transformer_of
from longlive_jax.memory import tree_bytes
from longlive_jax.models.transformer import init_params
from longlive_jax.quantize import numerics, tree
from longlive_jax.quantize.errors import layer_table, random_inputs
from longlive_jax.quantize.module import QuantizedTransformer, quantized
from longlive_jax.quantize.recipes import RECIPES as TABLE
from longlive_jax.quantize.recipes import rule_of
from tests.quantize._models import CONFIG, MODEL, RECIPES, begin, generator, random_params

WIDE = dataclasses.replace(CONFIG, dim=256, ffn_dim=512)


@pytest.fixture(scope="module")
def params():
    return random_params()


def wan_specs(recipe):
    config = override(PRESETS["wan_1_3b"], {"quantization": recipe})
    module = dataclasses.replace(transformer_of(config), param_dtype=jnp.bfloat16)
    return jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_wan_1_3b_shrinks_and_every_layer_has_its_own_scales(recipe):
    plain, small = wan_specs("none"), wan_specs(recipe)
    assert tree_bytes(plain) / tree_bytes(small) >= 1.9
    leaves = flatten(small)
    scales = {name: leaf for name, leaf in leaves.items() if name.endswith("/kernel_scale")}
    assert len(scales) == 10  # 8 projections and 2 feed-forward layers
    for name, scale in scales.items():
        kernel = leaves[name.replace("kernel_scale", "kernel")]
        layers, inputs, outputs = kernel.shape
        assert (scale.shape, scale.dtype) == ((layers, 1, outputs), jnp.float32), name
        assert layers == 30
        assert inputs >= 1536
        assert numerics.kind_of(kernel) == recipe.split("-")[0]
    rest = {name for name, leaf in leaves.items() if leaf.dtype == jnp.bfloat16}
    assert {"patch_embed/kernel", "head/proj/kernel", "time_proj/kernel"} < rest


@pytest.mark.parametrize("recipe", list(TABLE))
def test_every_linear_layer_of_the_model_has_a_rule_and_every_rule_a_layer_and_a_reason(recipe, params):
    layers = [name.rpartition("/")[0] for name in flatten(params) if name.endswith("/kernel")]
    used = {rule_of(recipe, layer) for layer in layers}
    assert used == set(TABLE[recipe])
    assert all(rule.why for rule in used)
    if recipe != "none":
        with pytest.raises(ValueError, match=r"no rule for the linear layer 'blocks/new'"):
            rule_of(recipe, "blocks/new")


def test_the_recipe_none_is_the_plain_module():
    assert quantized(MODEL, "none") is MODEL
    found = quantized(MODEL, "int8")
    assert isinstance(found, QuantizedTransformer)
    assert found == quantized(MODEL, "int8")  # equal models share compilations
    assert hash(found) == hash(quantized(MODEL, "int8"))
    assert found != quantized(MODEL, "fp8")


def test_specs_say_what_quantising_makes(params):
    found = flatten(tree.quantize_tree(params, "int8"))
    specs = tree.quantized_specs(flatten(params), "int8")
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    assert list(found) == list(specs)  # the order in which a file is written
    for name, leaf in flatten(params).items():
        if f"{name}_scale" in found:
            back = np.asarray(found[name], np.float32) * np.asarray(found[f"{name}_scale"])
            assert (np.abs(back - leaf) <= np.abs(leaf).max(-2, keepdims=True) / 253).all(), name
        else:
            assert found[name] is leaf


def test_errors_by_layer_and_of_the_result():
    model = dataclasses.replace(MODEL, config=WIDE)
    full = random_params(model)
    small, inputs = tree.quantize_on_device(jax.tree.map(jnp.copy, full), recipe="int8"), random_inputs(WIDE)
    table = layer_table(model, full, small, recipe="int8", inputs=inputs)
    assert [row.layer for row in table.rows] == [0, 1]
    for row in table.rows:
        assert len(row.linears) == 10
        assert all(5e-3 < error < 2e-2 for error in row.linears.values()), row
        assert 1e-3 < row.after < 2e-2
    assert f"velocity: {100 * table.velocity:.2f}" in str(table)

    # The same number as without the detour by blocks.
    @functools.partial(jax.jit, static_argnums=0)
    def run(module, params):
        context = module.apply({"params": params}, jnp.asarray(inputs.text), method="text_context")
        return module.apply({"params": params}, inputs.latents, jnp.asarray(inputs.timesteps), context)[0]

    exact, found = run(model, full), run(quantized(model, "int8"), small)
    error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert table.velocity == pytest.approx(error, rel=2e-2)


def products(program):
    """(left, right, result) dtypes of the matrix products in a lowered program."""
    tensor = r"tensor<(?:\d+x)*(\w+)>"
    return re.findall(rf"dot_general .*: \({tensor}, {tensor}\) -> {tensor}", program)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("int8", ("i8", "i8", "i32")),
        ("int8-rotated", ("i8", "i8", "i32")),
        ("fp8", ("f8E4M3FN", "f8E4M3FN", "f32")),
        ("int8-weight-only", ("bf16", "bf16", "f32")),
    ],
)
def test_the_block_step_lowered_for_a_gpu_multiplies_8_bit_numbers(recipe, expected):
    """8 products of the block's linear layers run on tokens (text keys and values are made in `init`)."""
    model = quantized(dataclasses.replace(MODEL, dtype=jnp.bfloat16), recipe)
    # One pass, so that every layer appears in two scans: the denoising one and the clean one.
    gen = generator(model, cache_dtype="int8")
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    text = jax.ShapeDtypeStruct((1, CONFIG.text_len, CONFIG.text_dim), jnp.bfloat16)
    seeds = jax.ShapeDtypeStruct((1,), jnp.uint32)
    state = jax.eval_shape(lambda p, t, s: gen.init(p, t, s, latent_size=(8, 8)), params, text, seeds)
    program = rollout.step.trace(gen, params, state).lower(lowering_platforms=("cuda",)).as_text()
    found = products(program)
    assert len(found) > 16  # the search sees what it is looking for
    assert found.count(expected) >= 16 if recipe == "int8-weight-only" else found.count(expected) == 16
    if recipe in ("int8", "fp8"):
        # What is left in bf16: the kept layers and attention, nothing as wide as the feed-forward.
        wide = [
            line for line in program.splitlines() if "dot_general" in line and f"x{CONFIG.ffn_dim}x" in line
        ]
        assert wide
        assert all(expected[0] in line for line in wide), wide


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_a_rollout_stays_near_that_in_full_precision(recipe, params):
    videos = []
    for model, weights in (
        (MODEL, params),
        (quantized(MODEL, recipe), tree.quantize_tree(params, recipe)),
    ):
        gen = generator(model)
        videos.append(np.asarray(rollout.rollout(gen, weights, begin(gen, weights), 6)[1]))
    error = np.abs(videos[1] - videos[0]).mean((0, 2, 3, 4)) / np.abs(videos[0]).mean()
    assert 1e-4 < error.max() < 0.1
    assert error[-3:].mean() < 2 * error[:3].mean()
