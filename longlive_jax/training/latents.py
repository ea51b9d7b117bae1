"""Encoded clips: the VAE runs once per clip. Where they are kept: `training.stored`."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from longlive_jax import toy
from longlive_jax.config import VAEConfig
from longlive_jax.config_dict import to_dict
from longlive_jax.models.vae import WanVAE
from longlive_jax.toy import data
from longlive_jax.training import stored
from longlive_jax.training import world as worlds
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
    switches: worlds.Switches | None = None,
    misshapen_share: float = 0.0,
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
      switches: which of them switch their attributes, and where.
      misshapen_share: how many of them, none of which switches, show a sprite that is none of the world's
        shapes (`toy.data.drawings`).
    """
    content: dict[str, Any] = {
        "vae": [fingerprint, to_dict(vae.config), str(vae.dtype)],
        "world": dataclasses.asdict(world),
        "clips": [clips.seed, clips.split, frames],
    }
    if switches is not None:
        content["switches"] = dataclasses.astuple(switches)
    if misshapen_share:
        content["misshapen"] = misshapen_share
    video_frames = vae.config.video_frames(frames)

    def make(indices: np.ndarray, scenes: toy.Scenes) -> np.ndarray:
        if switches is None:
            drawings = data.drawings(scenes.codes, share=misshapen_share, seed=clips.seed, indices=indices)
            video = toy.render(world, scenes, frames=video_frames, drawings=drawings)
        else:
            endings = switches.of(clips, indices, scenes)
            video = _render(world, scenes, endings, vae.config, frames=video_frames)
        return np.asarray(_encode(vae, params, video))

    return StoredClips(folder / f"{frames}-{stored.digest(content)}", world, clips, NAME, switches).complete(
        make, together=_ENCODED_TOGETHER
    )


def _render(
    world: toy.World, scenes: toy.Scenes, endings: worlds.Endings, vae: VAEConfig, *, frames: int
) -> np.ndarray:
    """Clips `[B, V, Y, X, 3]` that change to their endings; all else continues."""
    videos = []
    for row, begin in enumerate(endings.begin):
        scene = scenes[row : row + 1]
        starts: tuple[int, ...] = (0,)
        codes = scene.codes[:, None]
        if begin:
            starts = (0, vae.video_frames(int(begin)))
            codes = np.stack([scene.codes, endings.codes[row : row + 1]], axis=1)
        videos.append(toy.render_story(world, scene, toy.Story(starts, codes), frames=frames))
    return np.concatenate(videos)


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: WanVAE, params: Params, video: Array) -> Array:
    result: Any = vae.apply({"params": params}, video, method="encode")
    return result
