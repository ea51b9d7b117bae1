"""Tiled layers against the same layers on whole frames."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TAEW2_1, VAEConfig
from longlive_jax.config_dict import override
from longlive_jax.models import vae_layers
from longlive_jax.models.vae_families import init_params, make
from longlive_jax.models.vae_tiling import over_windows, tiled

WAN = VAEConfig(dim=4, num_res_blocks=1)
TAEHV = override(TAEW2_1, {"dim": 4, "num_res_blocks": 1})
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def drawn(shapes, seed=0):
    """Random values with nothing left at its zero initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def blur(x):
    """A local function that adds zeros around its input, as the layers do: sums of 5x5 positions."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)))
    rows, columns = x.shape[2:4]
    return sum(padded[:, :, i : i + rows, j : j + columns] for i in range(5) for j in range(5))


@pytest.mark.parametrize(("rows", "columns", "tile"), [(9, 12, 4), (4, 13, 4), (5, 5, 4), (30, 3, 7)])
def test_windows_give_the_values_of_the_whole_frame(rows, columns, tile):
    x = np.random.default_rng(0).integers(-9, 9, (2, 3, rows, columns, 2)).astype(np.float32)
    found = over_windows(blur, x, rows, columns, tile=tile, halo=2)
    np.testing.assert_array_equal(found, blur(x))  # small whole numbers: every order of sums is exact


def test_a_halo_that_is_too_narrow_shows():
    x = np.random.default_rng(0).integers(-9, 9, (1, 1, 9, 12, 1)).astype(np.float32)
    found = over_windows(blur, x, 9, 12, tile=4, halo=1)
    assert not np.array_equal(found, blur(x))


@functools.partial(jax.jit, static_argnames=("config", "tile"))
def decode(params, state, latents, *, config, tile):
    return make(config, tile=tile).apply({"params": params}, state, latents, method="decode_step")


@pytest.mark.parametrize("config", [WAN, TAEHV], ids=["wan", "taehv"])
def test_tiled_decoding_equals_whole_frames(config):
    params = drawn(jax.eval_shape(functools.partial(init_params, make(config)), jax.random.key(0)))
    latents = jax.random.normal(jax.random.key(1), (1, 2, 5, 7, 16))  # 40 x 56 pixels: 3 x 4 tiles
    states = {tile: make(config).init_decode_state(1, height=5, width=7) for tile in (0, 16)}
    for piece in (latents[:, :1], latents[:, 1:]):
        videos = {}
        for tile in states:
            videos[tile], states[tile] = decode(params, states[tile], piece, config=config, tile=tile)
        assert np.ptp(videos[0]) > 0.5, "the video must not be flat"
        np.testing.assert_allclose(videos[16], videos[0], **CLOSE)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *states.values())


def test_attention_in_groups_of_queries_sees_the_whole_frame():
    x = jax.random.normal(jax.random.key(0), (1, 2, 5, 7, 8))
    whole = vae_layers.FrameAttention()
    params = drawn(jax.eval_shape(whole.init, jax.random.key(0), x))
    for max_logits in (35, 4 * 35, 34 * 35):
        grouped = vae_layers.FrameAttention(max_logits)
        np.testing.assert_allclose(grouped.apply(params, x), whole.apply(params, x), **CLOSE)


def test_working_memory_is_that_of_a_tile():
    block = vae_layers.ResBlock(16)

    def temporary_bytes(size, tile):
        x = jax.ShapeDtypeStruct((1, 4, size, size, 16), jnp.float32)
        past = jax.ShapeDtypeStruct((1, 2, size, size, 16), jnp.float32)
        history = {"conv1": past, "conv2": past}
        params = jax.eval_shape(block.init, jax.random.key(0), x, history)

        def run(params, x, history):
            return tiled(block.bind(params), x, history, tile=tile, halo=block.HALO)

        return jax.jit(run).lower(params, x, history).compile().memory_analysis().temp_size_in_bytes

    frame, tile = (4 * 4 * 16 * size**2 for size in (128, 32 + 2 * block.HALO))
    assert temporary_bytes(128, 0) > 2 * frame
    assert temporary_bytes(128, 32) < frame + 8 * tile
