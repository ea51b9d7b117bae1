"""The transformer against diffusers' WanTransformer3DModel with the same random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from longlive_jax.config import TransformerConfig
from longlive_jax.convert import keys_transformer
from longlive_jax.models.transformer import Transformer
from tests import diffusers_models
from tests.models._loading import load_tree

CONFIG = TransformerConfig(
    dim=48, ffn_dim=80, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, text_len=9, latent_channels=8
)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers_models.transformer(CONFIG)
    with torch.no_grad():  # biases, gains and modulation tables away from their trivial initial values
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def params(theirs):
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return load_tree(keys_transformer.diffusers_table(CONFIG), arrays)


def inputs(batch: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    latents = random.standard_normal((batch, frames, height, width, CONFIG.latent_channels), np.float32)
    text = random.standard_normal((batch, CONFIG.text_len, CONFIG.text_dim), np.float32)
    return latents, np.linspace(987.5, 12.25, batch, dtype=np.float32), text


def ours(params, latents, timesteps, text, dtype=jnp.float32):
    model = Transformer(CONFIG, dtype=dtype)

    @jax.jit
    def run(params, latents, timesteps, text):
        context = model.apply({"params": params}, text, method="text_context")
        return model.apply({"params": params}, latents, timesteps[:, None], context)[0]

    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    return np.asarray(run(params, latents, timesteps, text))


def run_theirs(model, latents, timesteps, text, dtype=torch.float32):
    x = torch.tensor(latents.transpose(0, 4, 1, 2, 3).copy())
    with torch.inference_mode():
        out = model(x.to(dtype), torch.tensor(timesteps), torch.tensor(text).to(dtype)).sample
    return out.float().numpy().transpose(0, 2, 3, 4, 1)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"),
    [(1, 1, 2, 2), (2, 3, 6, 10), (3, 5, 14, 6), (2, 2, 10, 22)],  # odd numbers of patches, not square
)
def test_velocity(theirs, params, batch, frames, height, width):
    arguments = inputs(batch, frames, height, width)
    expected = run_theirs(theirs, *arguments)
    np.testing.assert_allclose(ours(params, *arguments), expected, rtol=1e-4, atol=5e-5)


def test_bfloat16_is_as_close_to_float32_as_theirs(theirs, params):
    """Within 1.25 of diffusers' own bfloat16 error, and 3% of the float32 result."""
    arguments = inputs(2, 3, 6, 10)
    exact = run_theirs(theirs, *arguments)
    rounded = run_theirs(copy.deepcopy(theirs).to(torch.bfloat16), *arguments, dtype=torch.bfloat16)
    found = ours(params, *arguments, dtype=jnp.bfloat16)

    def error(a):
        return np.linalg.norm(a - exact) / np.linalg.norm(exact)

    assert error(found) < min(0.03, 1.25 * error(rounded))
