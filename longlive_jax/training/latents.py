"""Encoded clips: the VAE runs once per clip. Where they are kept: `training.stored`."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from longlive_jax import toy
from longlive_jax.config_dict import to_dict
from longlive_jax.models.vae import WanVAE
from longlive_jax.training import stored
from longlive_jax.training.config import ClipsConfig
from longlive_jax.training.stored import StoredClips
from longlive_jax.types import Array, Params

NAME = "latents"

_ENCODED_TOGETHER = 8


def encode_clips(
    vae: WanVAE,
    params: Params,
    world: toy.World,
    clips: ClipsConfig,
    *,
    frames: int,
    folder: pathlib.Path,
    fingerprint: str,
) -> StoredClips:
    """Encodes the clips that are not on disk yet; rows are "latents" `[B, F, h, w, C]`.

    Args:
      vae: with its latent statistics.
      params: its parameters.
      world: of the clips.
      clips: which clips.
      frames: latent frames to encode of each; the VAE is causal, so that shorter clips are their beginnings.
      folder: shared by all processes.
      fingerprint: identifies the VAE's weights.
    """
    key = stored.digest(
        {
            "vae": [fingerprint, to_dict(vae.config), str(vae.dtype)],
            "world": dataclasses.asdict(world),
            "clips": [clips.seed, clips.split, frames],
        }
    )
    video_frames = vae.config.video_frames(frames)

    def make(_: np.ndarray, scenes: toy.Scenes) -> np.ndarray:
        return np.asarray(_encode(vae, params, toy.render(world, scenes, frames=video_frames)))

    return StoredClips(folder / f"{frames}-{key}", world, clips, NAME).complete(
        make, together=_ENCODED_TOGETHER
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: WanVAE, params: Params, video: Array) -> Array:
    result: Any = vae.apply({"params": params}, video, method="encode")
    return result
