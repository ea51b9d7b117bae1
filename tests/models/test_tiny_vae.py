"""The tiny autoencoder against a PyTorch reading of its published description, under the released names."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from longlive_jax import checkpoint
from longlive_jax.config import LIGHT_VAE, TAEW2_1, VAEConfig, preset, with_vae
from longlive_jax.convert import keys_tiny_vae, keys_vae
from longlive_jax.convert.convert import convert
from longlive_jax.convert.shapes import expected
from longlive_jax.errors import UserError
from longlive_jax.models.tiny_vae import TinyVAE

# Numbers of the modules in the released files, from pixels to latents and back.
DOWN = ((2, 3, (4, 5, 6)), (7, 8, (9, 10, 11)), (12, 13, (14, 15, 16)))
UP = (((3, 4, 5), 7, 8), ((9, 10, 11), 13, 14), ((15, 16, 17), 19, 20))
WIDTHS = (16, 8, 4, 4)  # a sixteenth of the released ones
DIM, LATENTS = 4, 16


@functools.cache
def released():
    """A state dict in the names and shapes of `taew2_1`, a sixteenth as wide."""
    rng = np.random.default_rng(0)
    state = {}

    def conv(name, inputs, outputs, *, size=3, bias=True):
        scale = (2 / (inputs * size * size)) ** 0.5
        state[f"{name}.weight"] = scale * rng.standard_normal((outputs, inputs, size, size), np.float32)
        if bias:
            state[f"{name}.bias"] = 0.1 * rng.standard_normal(outputs, np.float32)

    def memory(name, width):
        for i, inputs in ((0, 2 * width), (2, width), (4, width)):
            conv(f"{name}.conv.{i}", inputs, width)

    conv("encoder.0", 3, DIM)
    for (pool, stride, blocks), frames in zip(DOWN, (2, 2, 1), strict=True):
        conv(f"encoder.{pool}.conv", frames * DIM, DIM, size=1, bias=False)
        conv(f"encoder.{stride}", DIM, DIM, bias=False)
        for block in blocks:
            memory(f"encoder.{block}", DIM)
    conv("encoder.17", DIM, LATENTS)
    conv("decoder.1", LATENTS, WIDTHS[0])
    for i, ((blocks, grow, after), frames) in enumerate(zip(UP, (1, 2, 2), strict=True)):
        for block in blocks:
            memory(f"decoder.{block}", WIDTHS[i])
        conv(f"decoder.{grow}.conv", WIDTHS[i], frames * WIDTHS[i], size=1, bias=False)
        conv(f"decoder.{after}", WIDTHS[i], WIDTHS[i + 1], bias=False)
    conv("decoder.22", WIDTHS[3], 3)
    state["decoder.22.weight"] *= 0.3  # a grey picture: few values at the clamp
    state["decoder.22.bias"] += 0.5
    return state


def torch_conv(x, name, **options):
    state = released()
    bias = state.get(f"{name}.bias")
    weight = torch.from_numpy(state[f"{name}.weight"])
    return F.conv2d(x, weight, None if bias is None else torch.from_numpy(bias), **options)


def torch_memory(x, name):
    """x: frames [T, C, y, x]; each is seen together with the one before it, black before the first."""
    y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
    for i in (0, 2, 4):
        y = torch_conv(y if i == 0 else F.relu(y), f"{name}.conv.{i}", padding=1)
    return F.relu(x + y)


def torch_decode(latents):
    """[F, C, h, w] to frames [4 F - 3, 3, 8 h, 8 w] in [-1, 1]."""
    x = F.relu(torch_conv(3 * torch.tanh(latents / 3), "decoder.1", padding=1))
    for blocks, grow, after in UP:
        for block in blocks:
            x = torch_memory(x, f"decoder.{block}")
        width = x.shape[1]
        x = torch_conv(F.interpolate(x, scale_factor=2, mode="nearest"), f"decoder.{grow}.conv")
        x = torch.cat([part for frame in x.split(1) for part in frame.split(width, dim=1)])
        x = torch_conv(x, f"decoder.{after}", padding=1)
    return 2 * torch_conv(F.relu(x), "decoder.22", padding=1).clamp(0, 1)[3:] - 1


def torch_encode(video):
    """[4 F, 3, Y, X] in [-1, 1] to latents [F, C, h, w]."""
    x = F.relu(torch_conv((video + 1) / 2, "encoder.0", padding=1))
    for (pool, stride, blocks), frames in zip(DOWN, (2, 2, 1), strict=True):
        x = torch.stack([torch.cat(list(group)) for group in x.split(frames)])
        x = torch_conv(torch_conv(x, f"encoder.{pool}.conv"), f"encoder.{stride}", stride=2, padding=1)
        for block in blocks:
            x = torch_memory(x, f"encoder.{block}")
    return torch_conv(x, "encoder.17", padding=1)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taehv")
    save_file(released(), folder / "taew2_1.safetensors")
    convert(folder / "taew2_1.safetensors", folder / "small")
    return checkpoint.open_checkpoint(folder / "small")


def test_the_config_is_read_from_the_shapes(converted):
    config = converted.config.vae
    assert config == VAEConfig(**{**vars(TAEW2_1), "dim": DIM})
    assert (config.spatial_stride, config.temporal_stride) == (8, 4)


def test_decoding_and_streaming_match_pytorch(converted):
    vae, params = TinyVAE(converted.config.vae), {"params": converted.load("vae")}
    latents = np.random.default_rng(1).standard_normal((1, 3, 2, 3, LATENTS), np.float32)
    expected = torch_decode(torch.from_numpy(latents[0].transpose(0, 3, 1, 2)))
    assert expected.std() > 0.1, "the recording must not be flat"
    step = jax.jit(functools.partial(vae.apply, method="decode_step"))
    whole, _ = step(params, vae.init_decode_state(1, height=2, width=3), latents)
    np.testing.assert_allclose(whole[0], expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=5e-5)
    state, pieces = vae.init_decode_state(1, height=2, width=3), []
    for i in range(3):
        piece, state = step(params, state, latents[:, i : i + 1])
        pieces.append(np.asarray(piece))
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_encoding_matches_pytorch_and_fills_the_last_group(converted):
    vae, params = TinyVAE(converted.config.vae), {"params": converted.load("vae")}
    video = np.random.default_rng(2).uniform(-1, 1, (1, 8, 16, 24, 3)).astype(np.float32)
    video[:, 6:] = video[:, 5:6]
    expected = torch_encode(torch.from_numpy(video[0].transpose(0, 3, 1, 2))).numpy()
    encode = jax.jit(functools.partial(vae.apply, method="encode"))
    latents = encode(params, video[:, :6])
    np.testing.assert_allclose(latents[0], expected.transpose(0, 2, 3, 1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "table"), [(TAEW2_1, keys_tiny_vae.table), (LIGHT_VAE, keys_vae.table)], ids=["taehv", "light"]
)
def test_released_sizes_fit_the_key_table(config, table):
    model = dataclasses.replace(preset("wan_1_3b"), vae=config)
    assert {rule.target for rule in table(config).rules} == set(expected("vae", model))


def test_an_autoencoder_for_other_latents_is_refused(converted):
    other = dataclasses.replace(TAEW2_1, temporal_downsample=(True, False, False))
    model = dataclasses.replace(converted.config, vae=other)
    with pytest.raises(UserError, match="vae=small: its temporal_stride is 4 and the model's is 2"):
        with_vae(model, converted.config, "small")
