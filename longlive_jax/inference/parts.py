"""The parts of a pipeline: a config's flax modules, and their weights out of a checkpoint."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from longlive_jax import lora
from longlive_jax.checkpoint import Checkpoint
from longlive_jax.config import PipelineConfig
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.errors import UserError, require
from longlive_jax.inference.prompts import Device, PromptEncoder, PromptSource
from longlive_jax.models import rope, vae_families
from longlive_jax.models import transformer as transformer_lib
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.tiny_vae import TinyVAE
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.models.transformer import Transformer
from longlive_jax.models.vae import WanVAE
from longlive_jax.quantize import tree as quantize_tree
from longlive_jax.quantize.module import quantized
from longlive_jax.types import Params

Weights = Literal["auto", "transformer", "transformer_ema"]


def transformer_of(config: PipelineConfig) -> Transformer:
    """The flax module of a config's transformer."""
    module = Transformer(
        config.transformer,
        dtype=jnp.dtype(config.dtype),
        attention=config.attention,
        rope_jitter=rope.JITTER if config.window.rope == "jittered" else 0.0,
    )
    return quantized(module, config.quantization)


def decoder_of(config: PipelineConfig) -> WanVAE | TinyVAE:
    """The flax module of a config's VAE, of either family, as generation uses it."""
    return vae_families.make(config.vae, dtype=jnp.dtype(config.dtype), tile=config.vae_tile)


def vae_of(config: PipelineConfig) -> WanVAE:
    """The flax module of a config's Wan VAE, as training needs it.

    Raises:
      UserError: the config has another autoencoder.
    """
    module = decoder_of(config)
    if isinstance(module, WanVAE):
        return module
    raise UserError(f"vae.family={config.vae.family!r} decodes only; this needs the Wan VAE")


def text_encoder_of(config: PipelineConfig) -> TextEncoder:
    """The flax module of a config's text encoder."""
    return TextEncoder(config.text_encoder, dtype=jnp.dtype(config.dtype))


def choose_weights(opened: Checkpoint, weights: Weights) -> str:
    """The part that holds the transformer: "auto" takes the average only where there is nothing else."""
    if weights != "auto":
        return weights
    return "transformer_ema" if "transformer" not in opened.parts else "transformer"


def load_transformer(opened: Checkpoint, part: str, config: PipelineConfig, *, use_lora: bool) -> Params:
    """The transformer's parameters as `config` wants them, from a checkpoint that may be quantised."""
    stored = opened.config.quantization
    require(
        stored in ("none", config.quantization),
        f"quantization={config.quantization!r}: {opened.path} is stored as {stored!r} and cannot become "
        "another; give the checkpoint it was made from",
    )
    if stored != "none":
        module = transformer_of(dataclasses.replace(config, quantization=stored))
        shapes = jax.eval_shape(functools.partial(transformer_lib.init_params, module), jax.random.key(0))
        params = quantize_tree.cast(opened.load(part, expect=shapes), config.dtype)
        return jax.tree.map(jnp.asarray, params)
    expected = expected_tree("transformer", config)
    params = jax.tree.map(jnp.asarray, opened.load(part, dtype=config.dtype, expect=expected))
    if use_lora and "lora" in opened.parts:
        params = _merge_lora(params, opened.load("lora"), scale=opened.parts["lora"].lora_scale)
    if config.quantization != "none":
        params = quantize_tree.quantize_on_device(params, recipe=config.quantization)
    return params


@functools.partial(jax.jit, donate_argnums=0, static_argnames="scale")
def _merge_lora(params: Params, adapters: Params, *, scale: float) -> Params:
    return lora.merge(params, adapters, scale=scale)


def load_vae(opened: Checkpoint, config: PipelineConfig) -> Params | None:
    """The VAE's parameters in the compute precision of `config`; None where the checkpoint has none."""
    if "vae" not in opened.parts:
        return None
    expected = expected_tree("vae", config)
    return jax.tree.map(jnp.asarray, opened.load("vae", dtype=config.dtype, expect=expected))


def prompt_source(opened: Checkpoint, config: PipelineConfig, *, device: Device) -> PromptSource:
    """Prompts to embeddings; the encoder is loaded when a prompt needs it."""

    def make() -> PromptEncoder:
        module = text_encoder_of(config)
        expected = expected_tree("text_encoder", config)
        tokenizer = Tokenizer.from_file(opened.tokenizer_path, config.text_encoder)
        load = functools.partial(opened.load, "text_encoder", dtype=config.dtype, expect=expected)
        return PromptEncoder(tokenizer, module, load, opened.fingerprint("text_encoder"), device=device)

    return PromptSource(make)
