"""Converted weights compute what the library they were saved by computes."""

import functools
import pathlib

import jax
import numpy as np
import pytest
import torch

from longlive_jax import checkpoint
from longlive_jax.config import PRESETS
from longlive_jax.convert import keys_transformer
from longlive_jax.convert.convert import convert
from longlive_jax.convert.shapes import expected
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import Transformer
from longlive_jax.models.vae import WanVAE
from tests import diffusers_models
from tests.convert import sources
from tests.convert.sources import WAN
from tests.fixtures import load

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def test_diffusers_transformer(tmp_path: pathlib.Path) -> None:
    config = sources.TINY.transformer
    torch.manual_seed(0)
    model = diffusers_models.transformer(config)
    for parameter in model.parameters():  # norms and tables too, so that no swap goes unseen
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "transformer")
    convert(tmp_path, tmp_path / "ours", preset="tiny")
    latents, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, config.text_len, config.text_dim)
    times = torch.tensor([300.0, 625.0])
    with torch.no_grad():
        theirs = model(latents, timestep=times, encoder_hidden_states=text).sample.numpy()
    run = jax.jit(functools.partial(Transformer(config).apply, method="create"))
    ours = run(
        {"params": checkpoint.open_checkpoint(tmp_path / "ours").load("transformer")},
        np.moveaxis(latents.numpy(), 1, -1),
        times.numpy()[:, None],
        text.numpy(),
    )
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), theirs, **TOLERANCE)


def test_recorded_text_encoder(tmp_path: pathlib.Path) -> None:
    convert(
        WAN / "models_t5_umt5-tiny-enc-bf16.pth", tmp_path / "ours", overrides={"text_encoder.text_len": 16}
    )
    opened, recorded = checkpoint.open_checkpoint(tmp_path / "ours"), load("J")
    mask = recorded["t5/mask"]
    ours = jax.jit(TextEncoder(opened.config.text_encoder).apply)(
        {"params": opened.load("text_encoder", dtype=np.float32)},
        recorded["t5/ids"].astype(np.int32),
        mask.sum(1),
    )
    theirs = recorded["t5/raw_out_float32_from_bf16_weights"]
    np.testing.assert_allclose(np.asarray(ours)[mask > 0], theirs[mask > 0], **TOLERANCE)


def test_recorded_vae(tmp_path: pathlib.Path) -> None:
    convert(WAN / "Wan2.1_VAE.pth", tmp_path / "ours")
    opened, recorded = checkpoint.open_checkpoint(tmp_path / "ours"), load("J")
    latents = np.moveaxis(recorded["vae/latent_BTCHW"], 2, -1)
    decode = jax.jit(functools.partial(WanVAE(opened.config.vae).apply, method="decode"))
    video = decode({"params": opened.load("vae")}, latents)
    theirs = np.moveaxis(recorded["vae/decoded_BTCHW"], 2, -1)
    np.testing.assert_allclose(video, theirs, **TOLERANCE)


@pytest.mark.parametrize("layout", [keys_transformer.table, keys_transformer.diffusers_table])
def test_transformer_table_is_a_bijection(layout) -> None:
    """Every leaf of the model is filled from exactly one place, and comes back unchanged."""
    config = sources.TINY
    table = layout(config.transformer)
    shapes = expected("transformer", config)
    assert [rule.target for rule in table.rules] == list(dict.fromkeys(rule.target for rule in table.rules))
    assert {rule.target for rule in table.rules} == set(shapes)
    names = [name for name, _, _ in table.sources()]
    assert len(set(names)) == len(names) == 15 + 27 * config.transformer.num_layers
    generator = np.random.default_rng(0)
    for rule in table.rules:
        shape = shapes[rule.target].shape[1 if rule.is_stacked else 0 :]
        leaf = generator.normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(rule.to_ours(rule.to_source(leaf)), leaf)


def test_released_transformer_has_825_tensors() -> None:
    names = [name for name, _, _ in keys_transformer.table(PRESETS["wan_1_3b"].transformer).sources()]
    assert len(names) == 825
    sizes = jax.tree.map(lambda spec: spec.size, expected("transformer", PRESETS["wan_1_3b"]))
    assert sum(sizes.values()) == 1_418_996_800
