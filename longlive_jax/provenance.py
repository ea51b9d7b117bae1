"""What a result was made from, so that it can be made again: weights, settings, versions."""

import dataclasses
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from longlive_jax import config_dict
from longlive_jax.checkpoint import BUNDLED, Checkpoint
from longlive_jax.config import PipelineConfig

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av", "pillow", "tokenizers", "safetensors")
"""Distributions whose versions may change a result."""

# The sections of the config that describe how to generate; the others describe the weights.
_GENERATION = (
    "window",
    "sampler",
    "switch",
    "video",
    "dtype",
    "attention",
    "quantization",
    "cache_dtype",
    "vae_tile",
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a pipeline was loaded from.

    Attributes:
      checkpoint: how to find it again, see `place`.
      weights: the `weights` argument of `Pipeline.load`.
      use_lora: the `use_lora` argument of `Pipeline.load`.
      fingerprints: content ids of its parts.
      vae: the checkpoint that the VAE was taken from instead.
    """

    checkpoint: str
    weights: str
    use_lora: bool
    fingerprints: Mapping[str, str]
    vae: str | None = None


def versions() -> dict[str, str]:
    """Installed versions of the packages that may change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def place(path: pathlib.Path) -> str:
    """How to find a checkpoint again: a bundled one's name holds on every machine."""
    names = [name for name, bundled in BUNDLED.items() if bundled == path]
    return names[0] if names else os.path.abspath(path)


def fingerprints(checkpoint: Checkpoint, *, vae: Checkpoint | None = None) -> dict[str, str]:
    """Content ids of the parts that decide a video; `vae` is where another VAE comes from."""
    origins = dict.fromkeys(("transformer", "transformer_ema", "lora", "text_encoder"), checkpoint)
    origins["vae"] = vae or checkpoint
    return {part: origin.fingerprint(part) for part, origin in origins.items() if part in origin.parts}


def generation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recorded config that do not describe the weights, as dotted overrides."""
    settings: dict[str, Any] = {}
    for section in (name for name in _GENERATION if name in config):  # some are younger than a recording
        value = config[section]
        if isinstance(value, Mapping):
            settings |= {f"{section}.{name}": entry for name, entry in value.items()}
        else:
            settings[section] = value
    return settings


def differences(
    recorded: Mapping[str, Any], fingerprints: Mapping[str, str], config: PipelineConfig
) -> list[str]:
    """What may make a result differ from a recorded one, in words.

    Args:
      recorded: has "weights", the fingerprints of then, and "config".
      fingerprints: those of now.
      config: that of now.
    """
    found = [
        f"the {part} has other weights than those recorded"
        for part, digest in fingerprints.items()
        if recorded["weights"].get(part) != digest
    ]
    if config_dict.from_dict(PipelineConfig, recorded["config"]) != config:
        found.append("the model has another shape than the one recorded")
    return found
