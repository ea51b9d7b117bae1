"""What the commands with a live session share: the settings it begins with, and how the model is loaded."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longlive_jax.cli import options

if TYPE_CHECKING:
    from longlive_jax.checkpoint import Checkpoint
    from longlive_jax.config import PipelineConfig
    from longlive_jax.inference.pipeline import Pipeline


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the command line; without end unless it says otherwise."""
    return {"window.rope": "relative"} | options.overrides(arguments)


def open_config(
    arguments: argparse.Namespace, overrides: Mapping[str, Any]
) -> "tuple[Checkpoint, PipelineConfig]":
    """Opens the checkpoint and resolves its config; reads no weights.

    Raises:
      UserError: a setting does not fit, or there is no VAE to decode with.
    """
    from longlive_jax.cli import request

    checkpoint, config = request.open_config(arguments.checkpoint, overrides, vae=arguments.vae)
    if arguments.vae is None:
        checkpoint.part_file("vae")
    return checkpoint, config


def load(arguments: argparse.Namespace, overrides: Mapping[str, Any]) -> "Pipeline":
    """Loads the model."""
    from longlive_jax.inference.pipeline import Pipeline

    return Pipeline.load(
        arguments.checkpoint,
        overrides=overrides,
        weights=arguments.weights or "auto",
        use_lora=arguments.lora is not False,
        text_device=arguments.text_device or "default",
        vae=arguments.vae,
    )
