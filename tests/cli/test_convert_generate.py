"""From the release's files to a video: `longlive convert`, then `longlive generate`, on miniatures."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch

from longlive_jax import video
from longlive_jax.checkpoint import flatten, open_checkpoint
from longlive_jax.config import UMT5_XXL
from longlive_jax.convert import keys_text_encoder
from longlive_jax.models.text_encoder import TextEncoder, init_params
from longlive_jax.models.tokenizer import train_word_tokenizer
from tests.fixtures import CHECKPOINTS

PROMPT = "a red fox runs through deep snow"


@pytest.fixture
def release(tmp_path) -> list[pathlib.Path]:
    """Wan2.1's folder and LongLive's .pt files; the transformer, the LoRA and the VAE are recordings.

    Their text encoder is one of width 32, while Wan's transformers always read 4096, so one that fits
    is made here.
    """
    wan = tmp_path / "release/Wan2.1-T2V-1.3B"
    shutil.copytree(CHECKPOINTS / "wan_models/Wan2.1-T2V-tiny", wan)
    for old in wan.glob("models_t5_*.pth"):
        old.unlink()
    config = dataclasses.replace(
        UMT5_XXL, vocab_size=64, attn_dim=64, ffn_dim=64, num_heads=4, num_layers=1, text_len=16
    )
    shapes = flatten(jax.eval_shape(lambda key: init_params(TextEncoder(config), key), jax.random.key(0)))
    random, state = np.random.default_rng(0), {}
    for name, rule, layer in keys_text_encoder.table(config).sources():
        shape = shapes[rule.target].shape[0 if layer is None else 1 :]
        leaf = np.ones(shape) if rule.target.endswith("scale") else 0.05 * random.standard_normal(shape)
        state[name] = torch.tensor(np.ascontiguousarray(rule.to_source(leaf))).to(torch.bfloat16)
    torch.save(state, wan / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = wan / "google/umt5-xxl/tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    train_word_tokenizer([PROMPT], vocab_size=64, path=tokenizer)
    longlive = tmp_path / "release/LongLive-1.3B"
    shutil.copytree(CHECKPOINTS / "longlive_models/models", longlive)
    return [wan, longlive / "longlive_base.pt", longlive / "lora.pt"]


def test_released_files_become_a_video(longlive, release):
    converted = longlive("convert", *release, "checkpoint")
    assert converted.status == 0, converted.err
    assert set(open_checkpoint("checkpoint").parts) >= {"transformer", "text_encoder", "vae"}
    result = longlive(
        *("generate", "--checkpoint", "checkpoint", "--dtype", "float32", "--frames", "3", "--quiet"),
        *("--height", "32", "--width", "48", "--prompt", PROMPT, "--out", "v.mp4", "--sheet", "v.png"),
    )
    assert result.status == 0, result.err
    frames = video.read_video("v.mp4")
    assert frames.shape == (9, 32, 48, 3)
    assert frames.std() > 1  # noise, and not one colour
    assert pathlib.Path("v.png").stat().st_size > 1000
