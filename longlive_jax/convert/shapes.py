"""The parameter trees that the models expect, as shapes."""

import functools
from collections.abc import Mapping

import jax

from longlive_jax import lora
from longlive_jax.checkpoint import flatten
from longlive_jax.config import PipelineConfig
from longlive_jax.models import text_encoder, transformer, vae
from longlive_jax.storage import Spec
from longlive_jax.types import Params


def expected(part: str, config: PipelineConfig) -> dict[str, Spec]:
    """Shapes of the leaves of one part, by path; for LoRAs see `lora.init`.

    Args:
      part: a full part of `longlive_jax.checkpoint.PARTS`.
      config: the model's config.
    """
    return flatten(expected_tree(part, config))


def expected_tree(part: str, config: PipelineConfig) -> Params:
    """Like `expected`, as a nested dict."""
    key = jax.eval_shape(jax.random.key, 0)  # a shape too: nothing here runs on a device
    if part == "text_encoder":
        module = text_encoder.TextEncoder(config.text_encoder)
        ids = jax.ShapeDtypeStruct((1, 1), "int32")
        return jax.eval_shape(module.init, key, ids)["params"]
    if part == "vae":
        return jax.eval_shape(functools.partial(vae.init_params, vae.WanVAE(config.vae)), key)
    if part in ("transformer", "transformer_ema", "critic"):
        model = transformer.Transformer(config.transformer)
        return jax.eval_shape(functools.partial(transformer.init_params, model), key)
    raise ValueError(f"{part} has no fixed shapes")


def expected_lora(config: PipelineConfig, *, rank: int, targets: tuple[str, ...]) -> Mapping[str, Spec]:
    """Shapes of a LoRA of the given rank on the given layers."""
    params = expected_tree("transformer", config)
    init = functools.partial(lora.init, params=params, rank=rank, targets=targets)
    return flatten(jax.eval_shape(init, jax.eval_shape(jax.random.key, 0)))
