"""The umT5 encoder against the release's numbers, a file in the release's layout and transformers."""

import copy
import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from longlive_jax import config as configs
from longlive_jax.config import TextEncoderConfig
from longlive_jax.convert import keys_text_encoder
from longlive_jax.models import text_encoder
from longlive_jax.models.text_encoder import TextEncoder
from tests import fixtures
from tests.models._loading import load_tree

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
SMALL = TextEncoderConfig(
    vocab_size=50, dim=32, attn_dim=32, ffn_dim=64, num_heads=4, num_layers=3, num_buckets=8, text_len=24
)


def recorded(case: str):
    """(config, module, params, arrays) of one recorded case, "b8" or "b32"."""
    arrays = fixtures.weights(fixtures.load("G"), f"{case}/")
    config = dataclasses.replace(SMALL, num_buckets=int(case[1:]), text_len=arrays["ids"].shape[1])
    params = load_tree(keys_text_encoder.table(config), fixtures.weights(arrays, "w/"))
    return config, TextEncoder(config), params, arrays


@pytest.mark.parametrize("case", ["b8", "b32"])
def test_raw_output_equals_the_release(case):
    _, module, params, arrays = recorded(case)
    out = module.apply({"params": params}, arrays["ids"], arrays["mask"].sum(axis=1))
    np.testing.assert_allclose(out, arrays["raw_out"], **TOLERANCE)


@pytest.mark.parametrize("case", ["b8", "b32"])
def test_output_without_mask_equals_the_release(case):
    _, module, params, arrays = recorded(case)
    out = module.apply({"params": params}, arrays["ids"])
    np.testing.assert_allclose(out, arrays["raw_out_no_mask"], **TOLERANCE)


@pytest.mark.parametrize("case", ["b8", "b32"])
def test_prompt_embeddings_equal_the_release_and_end_in_exact_zeros(case):
    _, module, params, arrays = recorded(case)
    lengths = arrays["mask"].sum(axis=1)
    out = np.asarray(text_encoder.embed(module, params, ids=arrays["ids"], lengths=lengths))
    np.testing.assert_allclose(out, arrays["prompt_embeds_zeroed"], **TOLERANCE)
    for row, length in zip(out, lengths, strict=True):
        assert not row[length:].any()
        assert row[:length].any(axis=-1).all()


@pytest.mark.parametrize("case", ["b8", "b32"])
def test_position_buckets_equal_the_release(case):
    arrays = fixtures.weights(fixtures.load("G"), f"{case}/")
    buckets = text_encoder.relative_position_buckets(
        arrays["rel_pos"], num_buckets=int(case[1:]), max_distance=128
    )
    np.testing.assert_array_equal(buckets, arrays["rel_bucket"])


def test_position_buckets_are_exact_near_and_saturate_far():
    distance = np.array([-1000, -128, -3, -2, -1, 0, 1, 2, 3, 128, 1000])
    buckets = text_encoder.relative_position_buckets(distance, num_buckets=8, max_distance=128)
    assert buckets.tolist() == [3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7]


def test_gelu_is_the_tanh_form():
    arrays = fixtures.load("G")
    np.testing.assert_allclose(
        jax.nn.gelu(arrays["gelu_in"], approximate=True), arrays["gelu_out"], rtol=1e-5, atol=1e-6
    )


def test_file_in_the_wan_layout():
    file = fixtures.CHECKPOINTS / "wan_models/Wan2.1-T2V-tiny/models_t5_umt5-tiny-enc-bf16.pth"
    state = torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    config = dataclasses.replace(SMALL, vocab_size=64, num_layers=2, num_buckets=32, text_len=16)
    tree = load_tree(keys_text_encoder.table(config), {k: v.float().numpy() for k, v in state.items()})
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)  # as stored
    expected = fixtures.weights(fixtures.load("J"), "t5/")
    out = TextEncoder(config).apply({"params": params}, expected["ids"], expected["mask"].sum(axis=1))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected["raw_out_float32_from_bf16_weights"], **TOLERANCE)


# --- transformers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def umt5():
    """transformers' encoder of SMALL's shape, every parameter random, in float32."""
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=SMALL.vocab_size, d_model=SMALL.dim, d_kv=SMALL.head_dim, d_ff=SMALL.ffn_dim,
            num_layers=SMALL.num_layers, num_heads=SMALL.num_heads,
            relative_attention_num_buckets=SMALL.num_buckets, dropout_rate=0.0,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        # Gains near one; everything else large enough for attention to be far from uniform.
        mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.25)
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    return model


def transformers_params(model, dtype=jnp.float32):
    state = {k: v.float().numpy() for k, v in model.state_dict().items()}
    for alias, name in keys_text_encoder.TRANSFORMERS_ALIASES.items():
        np.testing.assert_array_equal(state.pop(alias), state[name])
    tree = load_tree(keys_text_encoder.transformers_table(SMALL), state)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


IDS = np.random.default_rng(0).integers(2, 50, (2, 24))
LENGTHS = np.array([24, 9])


def transformers_output(model) -> np.ndarray:
    mask = np.arange(24) < LENGTHS[:, None]
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(mask))
    return out.last_hidden_state.float().numpy()


def test_parity_with_transformers(umt5):
    params = transformers_params(umt5)
    ours = TextEncoder(SMALL).apply({"params": params}, IDS, LENGTHS)
    theirs = transformers_output(umt5)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(ours[b, :length], theirs[b, :length], **TOLERANCE)


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(umt5):
    low = copy.deepcopy(umt5).to(torch.bfloat16)
    exact = transformers_output(copy.deepcopy(low).float())  # the same rounded weights
    theirs = transformers_output(low)
    params = transformers_params(low, jnp.bfloat16)
    ours = TextEncoder(SMALL, dtype=jnp.bfloat16).apply({"params": params}, IDS, LENGTHS)
    assert ours.dtype == jnp.bfloat16
    ours = np.asarray(ours, np.float32)
    valid = np.arange(24) < LENGTHS[:, None]

    def error(a, b):
        return np.linalg.norm(a[valid] - b[valid]) / np.linalg.norm(b[valid])

    # Three layers, eight bits and peaked attention: over five seeds transformers is 3-5 % off its own
    # float32 result, and so are we; the two bfloat16 results are closer to each other (2-3 %).
    assert error(ours, exact) < 1.25 * error(theirs, exact)
    assert error(ours, theirs) < 0.04


# --- behaviour --------------------------------------------------------------------------------------


def test_padding_has_no_influence():
    _, module, params, arrays = recorded("b8")
    lengths = arrays["mask"].sum(axis=1)
    ids = arrays["ids"].copy()
    first = text_encoder.embed(module, params, ids=ids, lengths=lengths)
    ids[1, lengths[1] :] = 7
    np.testing.assert_array_equal(text_encoder.embed(module, params, ids=ids, lengths=lengths), first)


def test_zero_padding_removes_garbage_of_any_kind():
    embeddings = np.full((2, 3, 1), np.nan, np.float32)
    embeddings[0, :2] = 5
    embeddings[1, :1] = 6
    out = text_encoder.zero_padding(embeddings, np.array([2, 1]))
    np.testing.assert_array_equal(out[..., 0], [[5, 5, 0], [6, 0, 0]])


def test_an_id_beyond_the_vocabulary_is_not_silently_wrong():
    _, module, params, arrays = recorded("b8")
    ids = arrays["ids"].copy()
    ids[0, 3] = 50
    out = np.asarray(module.apply({"params": params}, ids))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compute_dtype_and_parameter_dtype_are_independent(dtype):
    module = TextEncoder(SMALL, dtype=dtype, param_dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), IDS, LENGTHS)
    assert out.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}


def test_initial_attention_is_soft():
    # Without 1/sqrt(H) in the logits the initialisation has to keep them of order one.
    params = jax.jit(text_encoder.init_params, static_argnums=0)(TextEncoder(SMALL), jax.random.key(0))
    attention = params["blocks"]["attn"]
    x = np.random.default_rng(0).normal(size=(256, SMALL.dim))
    q, k = (x @ attention[name]["kernel"][0] for name in "qk")
    logits = np.einsum("qh,kh->qk", q[:, : SMALL.head_dim], k[:, : SMALL.head_dim])
    assert 0.5 < logits.std() < 2


def test_xxl_has_the_parameters_of_the_released_file():
    init = functools.partial(text_encoder.init_params, TextEncoder(configs.UMT5_XXL))
    leaves = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")
    assert sum(leaf.size for leaf in leaves.values()) == 5_680_910_336
    assert leaves["blocks/attn/q/kernel"].shape == (24, 4096, 4096)
    assert leaves["blocks/attn/position"].shape == (24, 32, 64)
    assert leaves["token_embedding"].shape == (256384, 4096)


@pytest.mark.parametrize("table", [keys_text_encoder.table, keys_text_encoder.transformers_table])
def test_tables_fill_every_leaf_and_are_bijections(table):
    shapes = jax.eval_shape(TextEncoder(SMALL).init, jax.random.key(0), IDS)["params"]
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/")
    assert {rule.target for rule in table(SMALL).rules} == set(leaves)
    for rule in table(SMALL).rules:
        shape = leaves[rule.target].shape[1 if rule.is_stacked else 0 :]
        leaf = np.arange(np.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(rule.to_ours(rule.to_source(leaf)), leaf)


def test_transformers_names_are_exactly_those_of_its_model(umt5):
    names = {name for name, _, _ in keys_text_encoder.transformers_table(SMALL).sources()}
    assert names | set(keys_text_encoder.TRANSFORMERS_ALIASES) == set(umt5.state_dict())
