"""The video VAE against recorded numbers of the release, and the properties a stream relies on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import WAN_VAE, VAEConfig
from longlive_jax.convert import keys_vae
from longlive_jax.errors import UserError
from longlive_jax.models import vae_layers
from longlive_jax.models.vae import WanVAE, init_encoder_state, init_params
from tests.fixtures import load, weights
from tests.models._loading import load_tree

CONFIG = VAEConfig(dim=4)
SMALL = VAEConfig(dim=4, num_res_blocks=1)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@functools.cache
def recorded_params():
    return load_tree(keys_vae.table(CONFIG), weights(load("F"), "w/"))


@functools.cache
def small_params():
    """Random parameters with nothing left at its zero initialisation."""
    rng = np.random.default_rng(0)
    params = init_params(WanVAE(SMALL), jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), params)


TRACES = []


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(params, *arguments, config=CONFIG, method):
    TRACES.append(method)
    return WanVAE(config).apply({"params": params}, *arguments, method=method)


def stream(params, latents, split, *, config):
    """Decodes `latents` in pieces of the sizes in `split`; also returns every state on the way."""
    batch, _, height, width, _ = latents.shape
    state = WanVAE(config).init_decode_state(batch, height=height, width=width)
    pieces, states, start = [], [], 0
    for size in split:
        piece = latents[:, start : start + size]
        video, state = run(params, state, piece, config=config, method="decode_step")
        pieces.append(np.asarray(video))
        states.append(state)
        start += size
    assert start == latents.shape[1]
    return pieces, states


def ours(recorded, layout):
    """A recorded tensor as [B, frames, rows, columns, channels]."""
    return recorded.transpose({"BCTHW": (0, 2, 3, 4, 1), "BTCHW": (0, 1, 3, 4, 2)}[layout])


def random_latents(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# --- recorded numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "name"), [(9, "T9"), (1, "T1"), (7, "T7_tail_dropped")])
def test_encode_matches_the_release(frames, name):
    arrays = load("F")
    video = ours(arrays["enc/pixel"], "BCTHW")[:, :frames]
    latents = run(recorded_params(), video, method="encode")
    np.testing.assert_allclose(latents, ours(arrays[f"enc/latent_{name}"], "BTCHW"), **TOLERANCE)
    if name == "T7_tail_dropped":
        np.testing.assert_allclose(latents, ours(arrays["enc/latent_T5"], "BTCHW"), **TOLERANCE)
    if name == "T9":
        mean = latents * np.asarray(CONFIG.latent_std) + np.asarray(CONFIG.latent_mean)
        recorded = ours(arrays["enc/latent_T9_unnormalised_mu"], "BCTHW")
        np.testing.assert_allclose(mean, recorded, **TOLERANCE)


def test_encoder_moments_match_the_release():
    arrays = load("F")
    video = ours(arrays["enc/pixel"], "BCTHW")

    @jax.jit
    def moments(params):
        vae = WanVAE(CONFIG).bind({"params": params})
        state = init_encoder_state(CONFIG, 1, height=32, width=32, dtype=jnp.float32)
        first, state = vae.encoder(jnp.asarray(video[:, :1]), state)
        second, _ = vae.encoder(jnp.asarray(video[:, 1:5]), state)
        return first, second

    first, second = moments(recorded_params())
    np.testing.assert_allclose(first, ours(arrays["enc/encoder_out_first_chunk_2z"], "BCTHW"), **TOLERANCE)
    np.testing.assert_allclose(second, ours(arrays["enc/encoder_out_second_chunk_2z"], "BCTHW"), **TOLERANCE)


def test_decode_matches_the_release():
    arrays = load("F")
    video = run(recorded_params(), ours(arrays["dec/latent"], "BTCHW"), method="decode")
    np.testing.assert_allclose(video, ours(arrays["dec/wrapper_full_BTCHW_clamped"], "BTCHW"), **TOLERANCE)
    raw = ours(arrays["dec/raw_full_BCTHW"], "BCTHW")
    assert np.abs(raw).max() > 1, "the recording must reach the clamp"
    np.testing.assert_allclose(video, raw.clip(-1, 1), **TOLERANCE)


def test_decode_of_encoded_matches_the_release():
    arrays = load("F")
    latents = ours(arrays["enc/latent_T9"], "BTCHW")
    video = np.concatenate(stream(recorded_params(), latents, (1, 1, 1), config=CONFIG)[0], axis=1)
    np.testing.assert_allclose(video, ours(arrays["dec/of_enc_latent_T9_BTCHW"], "BTCHW"), **TOLERANCE)


def test_streamed_frames_match_the_release():
    arrays = load("F")
    latents = ours(arrays["dec/latent"], "BTCHW")
    pieces, _ = stream(recorded_params(), latents, (1, 1, 1, 1, 1), config=CONFIG)
    for index, piece in enumerate(pieces):
        recorded = ours(arrays[f"dec/stream_frame{index}_BCTHW"], "BCTHW").clip(-1, 1)
        assert piece.shape == recorded.shape
        np.testing.assert_allclose(piece, recorded, **TOLERANCE)


def test_restarting_for_every_chunk_matches_the_release():
    """The release's chunked decoding starts over with each chunk; a fresh state does the same."""
    arrays = load("F")
    latents = ours(arrays["dec/latent"], "BTCHW")
    pieces = []
    for chunk in (latents[:, :2], latents[:, 2:4], latents[:, 4:]):
        pieces += stream(recorded_params(), chunk, (1,) * chunk.shape[1], config=CONFIG)[0]
    video = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(video, ours(arrays["dec/chunk2_BTCHW_clamped"], "BTCHW"), **TOLERANCE)


def test_attention_block_matches_the_release():
    arrays = load("F")
    block = weights(arrays, "attnblock/w/")
    params = {
        "norm": {"scale": block["norm.gamma"].reshape(-1)},
        "qkv": {"kernel": block["to_qkv.weight"][:, :, 0, 0].T, "bias": block["to_qkv.bias"]},
        "proj": {"kernel": block["proj.weight"][:, :, 0, 0].T, "bias": block["proj.bias"]},
    }
    out = vae_layers.FrameAttention().apply({"params": params}, ours(arrays["attnblock/in"], "BCTHW"))
    np.testing.assert_allclose(out, ours(arrays["attnblock/out"], "BCTHW"), **TOLERANCE)


# --- streams --------------------------------------------------------------------------------------


@functools.cache
def whole_video():
    latents = random_latents(2, 5, 3, 5, 16)
    return latents, np.asarray(run(small_params(), latents, config=SMALL, method="decode"))


@pytest.mark.parametrize(
    "split",
    [
        (1, 1, 1, 1, 1),
        (2, 1, 2),
        (3, 2),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 2, 2), (2, 2, 1), (4, 1))),
    ],
)
def test_any_split_decodes_to_the_same_bits(split):
    latents, whole = whole_video()
    pieces, _ = stream(small_params(), latents, split, config=SMALL)
    assert [p.shape[1] for p in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_state_does_not_grow_and_steady_state_compiles_once():
    latents, _ = whole_video()
    _, states = stream(small_params(), latents, (1, 1, 1, 1, 1), config=SMALL)
    structures = {jax.tree.structure(state) for state in states}
    assert len(structures) == 1
    shapes = [[leaf.shape for leaf in jax.tree.leaves(state)] for state in states]
    assert all(s == shapes[0] for s in shapes)
    assert all(shape[1] == vae_layers.HISTORY_FRAMES for shape in shapes[0])
    traces = len(TRACES)
    run(small_params(), states[-1], latents[:, :1], config=SMALL, method="decode_step")
    assert len(TRACES) == traces


def test_videos_of_a_batch_do_not_mix():
    latents, whole = whole_video()
    changed = latents.at[1].set(random_latents(*latents.shape[1:], seed=7))
    video = np.asarray(run(small_params(), changed, config=SMALL, method="decode"))
    np.testing.assert_array_equal(video[0], whole[0])
    assert np.abs(video[1] - whole[1]).max() > 0.01


def test_the_past_is_independent_of_the_future():
    latents, whole = whole_video()
    changed = latents.at[:, 3:].set(0.0)
    video = np.asarray(run(small_params(), changed, config=SMALL, method="decode"))
    np.testing.assert_array_equal(video[:, :9], whole[:, :9])
    assert np.abs(video[:, 9:] - whole[:, 9:]).max() > 0.01


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encoding_and_decoding_keep_the_shape(frames):
    vae = WanVAE(SMALL)
    params = jax.eval_shape(functools.partial(init_params, vae), jax.random.key(0))
    video = jax.ShapeDtypeStruct((2, frames, 16, 24, 3), jnp.float32)
    latents = jax.eval_shape(functools.partial(run, config=SMALL, method="encode"), params, video)
    assert latents.shape == (2, (frames - 1) // 4 + 1, 2, 3, 16)
    decoded = jax.eval_shape(functools.partial(run, config=SMALL, method="decode"), params, latents)
    assert (decoded.shape, decoded.dtype) == (video.shape, jnp.float32)


@pytest.mark.parametrize("frames", [2, 4, 6, 8])
def test_frames_that_do_not_fill_a_group_are_dropped(frames):
    params = jax.eval_shape(functools.partial(init_params, WanVAE(SMALL)), jax.random.key(0))
    video = jax.ShapeDtypeStruct((1, frames, 16, 16, 3), jnp.float32)
    latents = jax.eval_shape(functools.partial(run, config=SMALL, method="encode"), params, video)
    assert latents.shape[1] == (frames - 1) // 4 + 1


# --- sizes, dtypes, keys --------------------------------------------------------------------------


def test_released_model_has_the_released_size():
    params = jax.eval_shape(functools.partial(init_params, WanVAE(WAN_VAE)), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 126_892_531


def test_parameters_are_stored_in_their_own_dtype():
    vae = WanVAE(SMALL, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    params = jax.eval_shape(functools.partial(init_params, vae), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    state = vae.init_decode_state(1, height=2, width=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("config", [WAN_VAE, VAEConfig(dim=24), CONFIG], ids=["wan", "light", "fixture"])
def test_key_table_fills_every_parameter(config):
    params = jax.eval_shape(functools.partial(init_params, WanVAE(config)), jax.random.key(0))
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for table in (keys_vae.table(config), keys_vae.diffusers_table(config)):
        assert {rule.target for rule in table.rules} == paths


def test_key_table_reads_and_writes_the_same_bits():
    arrays = weights(load("F"), "w/")
    shapes = jax.eval_shape(functools.partial(init_params, WanVAE(CONFIG)), jax.random.key(0))
    assert jax.tree.map(np.shape, recorded_params()) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    names = [name for name, _, _ in keys_vae.table(CONFIG).sources()]
    assert sorted(names) == sorted(arrays)
    for name, rule, _ in keys_vae.table(CONFIG).sources():
        back = rule.to_source(rule.to_ours(arrays[name]))
        assert back.shape == arrays[name].shape
        np.testing.assert_array_equal(back, arrays[name])


@pytest.mark.parametrize("way", ["stacked", "stacked_in_float32", "by_taps", "by_pairs"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_convolutions_agree(dtype, way):
    frames = jax.random.normal(jax.random.key(0), (2, 6, 3, 5, 6)).astype(dtype)
    kernel = (jax.random.normal(jax.random.key(1), (3, 3, 3, 6, 4)) / 13).astype(dtype)
    found = getattr(vae_layers, f"convolve_{way}")(frames, kernel)
    direct = vae_layers.convolve_directly(frames, kernel)
    assert (found.shape, found.dtype) == (direct.shape, direct.dtype) == ((2, 4, 3, 5, 4), dtype)
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found.astype(jnp.float32), direct.astype(jnp.float32), rtol=bound, atol=bound)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 5, 20, 16, 3), "divisible by 8"),
        ("encode", (1, 5, 16, 16, 4), "video.shape"),
        ("encode", (1, 0, 16, 16, 3), "no axis empty"),
        ("encode", (5, 16, 16, 3), "video.shape"),
        ("decode", (1, 2, 2, 2, 15), "latents.shape"),
        ("decode", (1, 0, 2, 2, 16), "no axis empty"),
        ("decode", (2, 2, 2, 16), "latents.shape"),
    ],
)
def test_wrong_shapes_are_refused(method, shape, message):
    with pytest.raises(UserError, match=message) as error:
        WanVAE(SMALL).apply({"params": {}}, np.zeros(shape, np.float32), method=method)
    assert "\n" not in str(error.value)


def test_latents_must_fit_the_state():
    vae = WanVAE(SMALL)
    state = vae.init_decode_state(1, height=2, width=3)
    with pytest.raises(UserError, match="2x3 latents"):
        vae.apply({"params": {}}, state, np.zeros((1, 1, 3, 2, 16), np.float32), method="decode_step")
    with pytest.raises(UserError, match="height=0"):
        vae.init_decode_state(1, height=0, width=3)
