"""The transformer against numbers recorded from the PyTorch release (fixture A) and its own promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax.convert import keys_transformer
from longlive_jax.models import layers, rope
from longlive_jax.models.transformer import Block, Transformer, init_params
from tests.fixtures import load, weights
from tests.models._loading import load_tree

TINY = config_lib.PRESETS["tiny"].transformer
SINGLE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def recorded():
    return load("A")


@pytest.fixture(scope="module")
def params(recorded):
    return load_tree(keys_transformer.table(TINY), weights(recorded, "w/"))


def padded(context: np.ndarray, length: int) -> np.ndarray:
    return np.pad(context, ((0, length - len(context)), (0, 0)))


@pytest.mark.parametrize(("name", "count"), [("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)])
def test_parameter_counts_of_the_released_models(name, count):
    model = Transformer(config_lib.PRESETS[name].transformer)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_the_key_table_names_825_tensors_for_wan_1_3b():
    table = keys_transformer.table(config_lib.WAN_1_3B)
    assert len(list(table.sources())) == 825
    assert len(list(keys_transformer.diffusers_table(config_lib.WAN_1_3B).sources())) == 825


def test_bidirectional_velocity_matches_the_release(recorded, params):
    text = jnp.stack([padded(recorded["ctx0"], 16), recorded["ctx1"]])
    model = Transformer(TINY)

    @jax.jit
    def run(params, x, t, text):
        text = model.apply({"params": params}, text, method="text_context")
        return model.apply({"params": params}, x, t[:, None], text)[0]

    x = recorded["x"].transpose(0, 2, 3, 4, 1)
    velocity = run(params, x, recorded["t"], text)
    expected = recorded["out_flow"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(velocity, expected, **SINGLE)


def test_intermediate_values_match_the_release(recorded, params):
    text = jnp.stack([padded(recorded["ctx0"], 16), recorded["ctx1"]])
    model = Transformer(TINY)
    x = recorded["x"].transpose(0, 2, 3, 4, 1)

    def captured(module, x, t, text):
        return module(x, t[:, None], module.text_context(text))

    _, state = model.apply(
        {"params": params},
        x,
        recorded["t"],
        text,
        method=captured,
        capture_intermediates=lambda module, name: name == "__call__" and module.name != "blocks",
        mutable=["intermediates"],
    )
    seen = state["intermediates"]
    time = seen["time_embed"]["__call__"][0][:, 0]
    np.testing.assert_allclose(time, recorded["inter/time_embedding_e"], **SINGLE)
    projected = seen["time_proj"]["__call__"][0][:, 0]
    np.testing.assert_allclose(projected, recorded["inter/time_projection_flat"], **SINGLE)
    np.testing.assert_allclose(seen["text_embed"]["__call__"][0], recorded["inter/text_embedding"], **SINGLE)
    patches = seen["patch_embed"]["__call__"][0][-1]  # [F, P, D] of the last sample
    expected = recorded["inter/patch_embedding_last_sample"][0]
    expected = expected.transpose(1, 2, 3, 0).reshape(patches.shape)
    np.testing.assert_allclose(patches, expected, **SINGLE)


def test_the_parts_of_a_block_match_the_release(recorded, params):
    """Queries before and after rotation, both attentions and both blocks, one layer at a time."""
    model = Transformer(TINY)
    text = jnp.stack([padded(recorded["ctx0"], 16), recorded["ctx1"]])
    text = model.apply({"params": params}, text, method="text_context")
    grid = (2, 5, 24)  # [B, F, P]
    rotation = rope.table(jnp.arange(5), 4, 6, TINY.head_dim)
    patches = recorded["x"].transpose(0, 2, 3, 4, 1).reshape(2, 5, 4, 2, 6, 2, 16)
    patches = patches.transpose(0, 1, 2, 4, 3, 5, 6).reshape(*grid, -1)
    x = patches @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    time = recorded["inter/time_projection_flat"].reshape(2, 1, 6, TINY.dim)
    for layer in range(2):
        block = Block(TINY, jnp.float32, jnp.float32, "reference")
        own = {"params": jax.tree.map(lambda a, i=layer: a[i], params["blocks"])}
        arguments = (x, time, rotation, jax.tree.map(lambda a, i=layer: a[i], text), None)
        keep = lambda module, name: name in ("__call__", "query", "output")  # noqa: E731
        (x, _), seen = block.apply(own, *arguments, capture_intermediates=keep, mutable=["intermediates"])
        np.testing.assert_allclose(x.reshape(2, 120, -1), recorded[f"inter/block{layer}_out"], **SINGLE)
        if layer == 0:
            first = seen["intermediates"]
    query = first["self_attn"]["query"][0]  # [B, F, P, N, H]
    np.testing.assert_allclose(query.reshape(2, 120, 4, 16), recorded["inter/block0_q_before_rope"], **SINGLE)
    turned = rope.rotate(query, rotation).reshape(2, 120, 4, 16)
    np.testing.assert_allclose(turned, recorded["inter/block0_q_after_rope"], **SINGLE)
    for part in ("self_attn", "cross_attn"):
        out = first[part]["output"][0].reshape(2, 120, -1)
        np.testing.assert_allclose(out, recorded[f"inter/block0_{part}_out"], **SINGLE)


@pytest.mark.parametrize("head_dim", [12, 16, 128])
def test_rotary_angles_match_the_recorded_tables(recorded, head_dim):
    groups = rope.channel_split(head_dim)
    cos = recorded[f"rope/freqs_hd{head_dim}_real_first64"]
    sin = recorded[f"rope/freqs_hd{head_dim}_imag_first64"]
    angles = rope.frame_angles(jnp.arange(64), head_dim)
    np.testing.assert_allclose(jnp.cos(angles), cos[:, : groups[0]], atol=2e-6)
    np.testing.assert_allclose(jnp.sin(angles), sin[:, : groups[0]], atol=2e-6)
    # Rows and columns: frame 0 of a grid as large as the recorded table.
    table = rope.table(jnp.zeros(1, jnp.int32), 64, 64, head_dim)
    plane = np.asarray(table.cos).reshape(64, 64, -1)
    np.testing.assert_allclose(
        plane[:, 0, groups[0] : groups[0] + groups[1]], cos[:, groups[0] : -groups[2]], atol=2e-6
    )
    np.testing.assert_allclose(plane[0, :, -groups[2] :], cos[:, -groups[2] :], atol=2e-6)


@pytest.mark.parametrize(("start", "key"), [(0, ""), (7, "_startframe7")])
def test_rotation_matches_the_release(recorded, start, key):
    x = recorded["rope/hd128_in"].reshape(1, 2, 12, 1, 128)
    table = rope.table(jnp.arange(2) + start, 3, 4, 128)
    expected = recorded[f"rope/hd128_out_f2_h3_w4{key}"].reshape(x.shape)
    np.testing.assert_allclose(rope.rotate(x, table), expected, **SINGLE)


@pytest.mark.parametrize("position", [1023, 4096, 100_000, 2**30, 2**31 - 1, -5])
def test_frame_angles_are_exact_far_from_the_start(position):
    exact = position * 10000.0 ** (-np.arange(22, dtype=np.longdouble) / 22)
    angles = np.asarray(rope.frame_angles(jnp.asarray([position]), 128))[0]
    two_pi = 2 * np.pi if abs(position) < 2**24 else 2 * np.longdouble("3.14159265358979323846")
    difference = np.remainder(angles - exact + np.pi, two_pi) - np.pi
    assert np.abs(difference).max() < 2e-6


def test_shifting_rotated_keys_equals_rotating_at_the_shifted_position():
    keys = jax.random.normal(jax.random.key(0), (1, 2, 3, 4, 2, 16))  # [L, B, S, P, N, H]
    positions = jnp.arange(3)
    at_home = rope.rotate(keys[0], rope.table(positions, 2, 2, 16))[None]
    shift = jnp.asarray([5, 900])
    moved = rope.shift_frames(at_home, shift)
    expected = rope.rotate(keys[0], rope.table(positions + shift[:, None], 2, 2, 16))
    np.testing.assert_allclose(moved[0], expected, atol=2e-5)


@pytest.mark.parametrize("dim", [32, 256])
def test_timestep_embedding_matches_the_release(recorded, dim):
    embedding = layers.timestep_embedding(recorded["time/t"], dim)
    np.testing.assert_allclose(embedding, recorded[f"time/sinusoid_dim{dim}"], atol=2e-6)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(params, remat):
    text = jax.random.normal(jax.random.key(1), (1, 16, 32))
    x = jax.random.normal(jax.random.key(2), (1, 2, 4, 6, 16))

    def loss(params, policy):
        model = Transformer(TINY, remat=policy)
        text_context = model.apply({"params": params}, text, method="text_context")
        return jnp.sum(model.apply({"params": params}, x, jnp.full((1, 2), 500.0), text_context)[0] ** 2)

    plain = jax.grad(loss)(params, "none")
    recomputed = jax.grad(loss)(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, recomputed)


def test_one_timestep_per_video_equals_the_same_timestep_for_every_frame(params):
    model = Transformer(TINY)
    x = jax.random.normal(jax.random.key(2), (2, 3, 4, 6, 16))
    text = model.apply({"params": params}, jnp.zeros((2, 16, 32)), method="text_context")
    one = model.apply({"params": params}, x, jnp.asarray([[3.0], [700.0]]), text)[0]
    each = model.apply({"params": params}, x, jnp.asarray([[3.0] * 3, [700.0] * 3]), text)[0]
    np.testing.assert_allclose(one, each, atol=1e-6)


def test_bfloat16_compute_stays_close_and_keeps_its_types(params, recorded):
    text = jnp.stack([padded(recorded["ctx0"], 16), recorded["ctx1"]])
    x = recorded["x"].transpose(0, 2, 3, 4, 1)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    model = Transformer(TINY, dtype=jnp.bfloat16)
    text = model.apply({"params": params}, text, method="text_context")
    velocity, own = model.apply({"params": params}, x, recorded["t"][:, None], text)
    assert (velocity.dtype, own.key.dtype, text.key.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    expected = recorded["out_flow"].transpose(0, 2, 3, 4, 1)
    error = np.linalg.norm(velocity - expected) / np.linalg.norm(expected)
    assert error < 0.02


def test_a_model_of_the_clean_latents_returns_their_velocity(params):
    """(noisy - x0) / sigma of what the same network puts out, sigma no smaller than 0.25."""
    latents = np.random.default_rng(0).normal(size=(1, 3, 4, 6, 16)).astype(np.float32)
    timesteps = np.array([[1000.0, 500.0, 100.0]], np.float32)

    def run(config):
        model = Transformer(config)
        text = model.apply({"params": params}, jnp.ones((1, 16, 32)), method="text_context")
        return np.asarray(model.apply({"params": params}, latents, timesteps, text)[0])

    output = run(TINY)
    sigma = np.array([1.0, 0.5, 0.25])[None, :, None, None, None]
    expected = (latents - output) / sigma
    np.testing.assert_allclose(
        run(dataclasses.replace(TINY, prediction="x0")), expected, rtol=1e-5, atol=1e-5
    )
