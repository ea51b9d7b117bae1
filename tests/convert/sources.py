"""Sources for the conversion tests: the recorded files, and complete tiny models in every layout."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.torch import load_file

from longlive_jax import checkpoint
from longlive_jax.checkpoint import Checkpoint
from longlive_jax.config import PRESETS, PipelineConfig
from longlive_jax.config_dict import override
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.models.transformer import Transformer
from longlive_jax.types import Params
from tests.fixtures import CHECKPOINTS, load

WAN = CHECKPOINTS / "wan_models" / "Wan2.1-T2V-tiny"
LONGLIVE = CHECKPOINTS / "longlive_models" / "models"
# The LongLive files say neither of these.
RECORDED = {"transformer.num_heads": 2, "transformer.text_len": 16}
TINY = PRESETS["tiny"]


def state_dict(file: pathlib.Path) -> dict[str, Any]:
    """Everything in a PyTorch or safetensors file."""
    import torch

    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def wan_state_dict() -> dict[str, Any]:
    """The recorded transformer under its original names."""
    return state_dict(WAN / "diffusion_pytorch_model.safetensors")


def random_tree(part: str, config: PipelineConfig, *, seed: int = 0) -> Params:
    """Random float32 parameters of a part."""
    generator = np.random.default_rng(seed)

    def draw(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        return generator.normal(size=spec.shape).astype(np.float32) / 8

    return jax.tree.map(draw, expected_tree(part, config))


def write_tokenizer(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<pad>"}}))
    return path


def tiny_checkpoint(path: pathlib.Path, *, config: PipelineConfig = TINY) -> Checkpoint:
    """A complete checkpoint of the tiny preset with random weights."""
    tokenizer = write_tokenizer(path.parent / "tokenizer_source" / "tokenizer.json")
    with checkpoint.create(path, config, source={}) as writer:
        for seed, part in enumerate(("transformer", "text_encoder", "vae")):
            writer.add_tree(part, random_tree(part, config, seed=seed))
        writer.add_tokenizer(tokenizer)
    return checkpoint.open_checkpoint(path)


def recorded_flow(
    opened: Checkpoint, *, params: Params | None = None, part: str = "transformer"
) -> np.ndarray:
    """The velocity of the recorded input, `[B, F, C, h, w]` like the recording."""
    recorded = load("J")
    config = override(opened.config, {"dtype": "float32"}).transformer
    latents = np.moveaxis(recorded["in/x_BCTHW"], 1, -1)
    text = np.zeros((1, config.text_len, config.text_dim), np.float32)
    text[0, : len(recorded["in/ctx_5x4096"])] = recorded["in/ctx_5x4096"]
    tree = opened.load(part, dtype=np.float32) if params is None else params
    flow = _run(Transformer(config), tree, latents, np.full((1, latents.shape[1]), 625.0, np.float32), text)
    return np.asarray(jnp.moveaxis(flow, -1, 2))


@functools.partial(jax.jit, static_argnums=0)
def _run(model: Transformer, params: Params, latents: Any, timesteps: Any, text: Any) -> Any:
    return model.apply({"params": params}, latents, timesteps, text, method="create")


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit-exact equality of two state dicts, names and precisions included."""
    import torch

    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
