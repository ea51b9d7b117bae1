"""The video VAE against Diffusers' AutoencoderKLWan with small random weights."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive_jax.config import WAN_VAE, VAEConfig
from longlive_jax.convert import keys_vae
from longlive_jax.models.vae import WanVAE
from tests import diffusers_models
from tests.models._loading import load_tree

CONFIGS = {
    "four_levels": VAEConfig(dim=4, num_res_blocks=1),
    "three_levels": VAEConfig(dim=6, num_res_blocks=1, dim_mult=(1, 3, 2), temporal_downsample=(True, True)),
}


@functools.cache
def reference(name):
    config = CONFIGS[name]
    model = diffusers_models.vae(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("gamma"):
                parameter.copy_(1 + 0.2 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def our_params(name):
    state = {key: value.numpy() for key, value in reference(name).state_dict().items()}
    return load_tree(keys_vae.diffusers_table(CONFIGS[name]), state)


def run(name, array, *, method, dtype=jnp.float32):
    vae = WanVAE(CONFIGS[name], dtype=dtype)
    apply = jax.jit(functools.partial(vae.apply, method=method))
    return np.asarray(apply({"params": our_params(name)}, array))


def their_decode(model, latents, config):
    raw = latents * np.float32(config.latent_std) + np.float32(config.latent_mean)
    raw = torch.from_numpy(raw.transpose(0, 4, 1, 2, 3)).to(model.dtype)  # [B, C, F, h, w]
    with torch.no_grad():
        video = model.decode(raw, return_dict=False)[0].float().numpy()
    return video.transpose(0, 2, 3, 4, 1)


def latents_for(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 3, 3, 5, 16)).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode(name):
    latents = latents_for()
    theirs = their_decode(reference(name), latents, CONFIGS[name])
    video = run(name, latents, method="decode")
    assert video.shape == theirs.shape
    np.testing.assert_allclose(video, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_encode(name):
    config = CONFIGS[name]
    size = (3 * config.spatial_stride, 5 * config.spatial_stride)
    video = np.random.default_rng(1).uniform(-1, 1, (2, 9, *size, 3)).astype(np.float32)
    with torch.no_grad():
        mean = reference(name).encode(torch.from_numpy(video.transpose(0, 4, 1, 2, 3))).latent_dist.mode()
    theirs = (mean.numpy().transpose(0, 2, 3, 4, 1) - config.latent_mean) / np.asarray(config.latent_std)
    latents = run(name, video, method="encode")
    assert latents.shape == (2, 3, 3, 5, 16)
    np.testing.assert_allclose(latents, theirs, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_as_close_to_float32_as_theirs():
    """Root mean square error below 0.02 of the [-1, 1] range, and at most 1.2 times that of Diffusers."""
    name = "four_levels"
    latents = latents_for()
    exact = their_decode(reference(name), latents, CONFIGS[name])
    theirs = their_decode(copy.deepcopy(reference(name)).to(torch.bfloat16), latents, CONFIGS[name])
    ours = run(name, latents, method="decode", dtype=jnp.bfloat16)
    our_error, their_error = (np.sqrt(np.mean((v - exact) ** 2)) for v in (ours, theirs))
    assert 0 < our_error < 0.02
    assert our_error < 1.2 * their_error


@pytest.mark.parametrize("config", [WAN_VAE, VAEConfig(dim=24)], ids=["wan", "light"])
def test_key_table_names_every_tensor(config):
    with torch.device("meta"):
        state = AutoencoderKLWan(base_dim=config.dim).state_dict()
    table = keys_vae.diffusers_table(config)
    assert sorted(name for name, _, _ in table.sources()) == sorted(state)
    for name, rule, _ in table.sources():
        assert rule.to_source(rule.to_ours(np.empty(state[name].shape))).shape == tuple(state[name].shape)
