"""LoRA trees: sizes, initialisation, and the merge against the recorded release."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import checkpoint, lora
from longlive_jax.config import PRESETS, TransformerConfig
from longlive_jax.convert import keys_transformer
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.convert.table import Table
from longlive_jax.errors import UserError
from longlive_jax.models.transformer import Transformer
from longlive_jax.types import Params
from tests.fixtures import load, weights

# Fixture I: two causal passes of one block, as recorded from the release.
CONFIG = TransformerConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=16
)


def _tree(tensors: dict[str, np.ndarray], table: Table) -> Params:
    """Recorded weights as our tree."""
    layers: dict[str, list[np.ndarray]] = {}
    for name, rule, _ in table.sources():
        layers.setdefault(rule.target, []).append(rule.to_ours(tensors[name]))
    stacked = {rule.target: rule.is_stacked for rule in table.rules}
    return checkpoint.unflatten({k: np.stack(v) if stacked[k] else v[0] for k, v in layers.items()})


@pytest.fixture(scope="module")
def recorded() -> tuple[Params, Params]:
    """The recorded base weights and LoRA."""
    arrays = load("I")
    base = _tree(weights(arrays, "base/"), keys_transformer.table(CONFIG))
    table = keys_transformer.lora_table(CONFIG.num_layers, lora.ALL_TARGETS)
    return base, _tree(weights(arrays, "lora/"), table)


def test_released_lora_has_the_published_size() -> None:
    params = expected_tree("transformer", PRESETS["wan_1_3b"])
    tree = jax.eval_shape(lambda key: lora.init(key, params, rank=256), jax.random.key(0))
    assert lora.parameter_count(tree) == 349_962_240
    assert len(jax.tree.leaves(tree)) * 30 == 600  # tensors in the file


def test_new_lora_changes_nothing_and_is_spread_like_peft() -> None:
    params = expected_tree("transformer", PRESETS["tiny"])
    zeros = jax.tree.map(lambda spec: jnp.ones(spec.shape), params)
    tree = lora.init(jax.random.key(0), zeros, rank=8)
    merged = lora.merge(zeros, tree, scale=1.0)
    jax.tree.map(np.testing.assert_array_equal, merged, zeros)
    factors = tree["blocks"]["ffn"]["fc2"]
    assert factors["a"].shape == (2, 128, 8)
    assert factors["b"].shape == (2, 8, 64)
    bound = 1 / np.sqrt(128)  # kaiming_uniform(a=sqrt(5)) of a [rank, in] matrix
    assert 0.95 * bound < float(jnp.abs(factors["a"]).max()) <= bound
    assert not np.array_equal(tree["blocks"]["self_attn"]["q"]["a"], tree["blocks"]["self_attn"]["k"]["a"])


def test_recorded_flows_of_base_and_merged_weights(recorded: tuple[Params, Params]) -> None:
    arrays, (base, adapter) = load("I"), recorded
    rank, alpha = arrays["lora_rank_alpha"]
    merged = jax.jit(lora.merge)(base, adapter, scale=alpha / rank)
    q = merged["blocks"]["self_attn"]["q"]["kernel"][0]
    np.testing.assert_allclose(
        q.T, arrays["merged_example/blocks.0.self_attn.q.weight"], rtol=1e-5, atol=1e-6
    )
    run = jax.jit(functools.partial(Transformer(CONFIG).apply, method="create"))
    latents = np.moveaxis(arrays["x"], 2, -1)  # [B, F, h, w, C]
    for params, names in ((base, ["flow_base"]), (merged, ["flow_lora", "flow_merged"])):
        for i, timestep in enumerate(arrays["t_passes"]):
            flow = run({"params": params}, latents, np.full((1, 3), timestep), arrays["ctx"])
            for name in names:
                np.testing.assert_allclose(np.moveaxis(flow, -1, 2), arrays[name][i], rtol=1e-4, atol=2e-5)
    assert np.abs(arrays["flow_base"] - arrays["flow_lora"]).max() > 1e-2


def test_our_names_are_the_saved_ones(recorded: tuple[Params, Params]) -> None:
    arrays = load("I")
    table = keys_transformer.lora_table(CONFIG.num_layers, lora.ALL_TARGETS)
    critic = json.loads(bytes(arrays["critic_lora_keys_json"]).decode())
    assert {name for name, _, _ in table.sources()} == set(critic)
    assert {name for name, _, _ in table.sources()} == set(weights(arrays, "lora/"))
    assert lora.rank_of(recorded[1]) == 4


def test_merge_keeps_precision_and_untouched_leaves(recorded: tuple[Params, Params]) -> None:
    base, adapter = recorded
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base)
    only_q = {"blocks": {"self_attn": {"q": adapter["blocks"]["self_attn"]["q"]}}}
    merged = lora.merge(half, only_q, scale=2.0)
    kernel = merged["blocks"]["self_attn"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    factors = only_q["blocks"]["self_attn"]["q"]
    exact = half["blocks"]["self_attn"]["q"]["kernel"].astype(jnp.float32) + 2.0 * (
        factors["a"] @ factors["b"]
    )
    np.testing.assert_array_equal(kernel, exact.astype(jnp.bfloat16))
    assert merged["blocks"]["self_attn"]["k"]["kernel"] is half["blocks"]["self_attn"]["k"]["kernel"]
    assert merged["blocks"]["self_attn"]["q"]["bias"] is half["blocks"]["self_attn"]["q"]["bias"]


def test_gradient_reaches_b_first(recorded: tuple[Params, Params]) -> None:
    base, _ = recorded
    tree = lora.init(jax.random.key(1), base, rank=2, targets=("blocks/ffn/fc1",))

    def loss(adapter: Params) -> jax.Array:
        return jnp.sum(lora.merge(base, adapter, scale=1.0)["blocks"]["ffn"]["fc1"]["kernel"] ** 2)

    gradient = jax.grad(loss)(tree)["blocks"]["ffn"]["fc1"]
    assert np.abs(gradient["b"]).max() > 0
    assert np.abs(gradient["a"]).max() == 0  # b is zero


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"lora\.rank=0 must be 1 or more"),
        ({"rank": 2, "targets": ()}, r"lora\.targets is empty"),
        ({"rank": 2, "targets": ("blocks/norm",)}, "'blocks/norm' is not a linear layer"),
        ({"rank": 2, "targets": ("head/proj",)}, "'head/proj' is not a layer-stacked linear layer"),
    ],
)
def test_bad_arguments(arguments: dict, message: str, recorded: tuple[Params, Params]) -> None:
    with pytest.raises(UserError, match=message):
        lora.init(jax.random.key(0), recorded[0], **arguments)


def test_mixed_ranks_are_refused(recorded: tuple[Params, Params]) -> None:
    trees = [
        lora.init(jax.random.key(0), recorded[0], rank=r, targets=(f"blocks/ffn/fc{r}",)) for r in (1, 2)
    ]
    mixed = {"blocks": {"ffn": {**trees[0]["blocks"]["ffn"], **trees[1]["blocks"]["ffn"]}}}
    with pytest.raises(UserError, match=r"ranks \[1, 2\]"):
        lora.rank_of(mixed)
