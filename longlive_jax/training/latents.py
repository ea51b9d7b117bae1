"""Encoded clips on disk: the VAE runs once per clip, however many passes a stage makes over them.

    <folder>/<key>/00000.npy ...   float16 [SHARD_CLIPS, F, h, w, C], clips in the order of their index

The key stands for everything the latents depend on (the VAE's weights and statistics, the world, the
seed, the split, the number of frames), so a folder can be shared by runs, and what is there is never
stale. A shard appears complete or not at all; an interrupted encoding goes on with the first one missing.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import grain
import jax
import numpy as np
from grain.sharding import ShardOptions

from longlive_jax import storage, toy
from longlive_jax.config import to_dict
from longlive_jax.models.vae import WanVAE
from longlive_jax.toy import data as toy_data
from longlive_jax.training import processes
from longlive_jax.training import world as worlds
from longlive_jax.training.config import ClipsConfig
from longlive_jax.training.metrics import say
from longlive_jax.types import Array, Params

SHARD_CLIPS = 64
_ENCODE_CLIPS = 8  # encoded together


@dataclasses.dataclass(frozen=True)
class EncodedClips:
    """Encoded clips of the toy world.

    Attributes:
      folder: of the shards.
      world: of the clips.
      clips: which clips, how many, how much of each is used.
    """

    folder: pathlib.Path
    world: toy.World
    clips: ClipsConfig

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """`{"latents" float32 [B, F, h, w, C], "caption" int32 [B], rows of world.caption_table()}`."""
        used = slice(self.clips.frames)
        latents = [_shard(self.folder, int(i) // SHARD_CLIPS)[int(i) % SHARD_CLIPS, used] for i in indices]
        scenes = toy.sample_scenes(self.world, seed=self.clips.seed, indices=indices, split=self.clips.split)
        return {
            "latents": np.stack(latents).astype(np.float32),
            "caption": worlds.caption_rows(scenes.codes, scenes.template),
        }

    def batches(self, shard: ShardOptions) -> "grain.IterDataset[dict[str, np.ndarray]]":
        """Endless batches; see `toy.data.stream`."""
        return toy_data.stream(worlds.stream_config(self.clips), shard, self.rows)


def encode_clips(
    vae: WanVAE,
    params: Params,
    world: toy.World,
    clips: ClipsConfig,
    *,
    frames: int,
    folder: pathlib.Path,
    fingerprint: str,
) -> EncodedClips:
    """Encodes the clips that are not on disk yet; processes share the work.

    Args:
      vae: with its latent statistics.
      params: its parameters.
      world: of the clips.
      clips: which clips.
      frames: latent frames to encode of each; the VAE is causal, so that shorter clips are their beginnings.
      folder: shared by all processes.
      fingerprint: identifies the VAE's weights.
    """
    path = folder / _key(vae, world, clips, frames, fingerprint)
    path.mkdir(parents=True, exist_ok=True)
    shards = -(-clips.examples // SHARD_CLIPS)
    missing = [i for i in range(shards) if not _file(path, i).exists()]
    mine = missing[jax.process_index() :: jax.process_count()]
    for count, index in enumerate(mine):
        if count % 8 == 0:
            say(f"encoding clips into {path}: {count}/{len(mine)} shards")
        _encode_shard(vae, params, world, clips, frames, path, index)
    processes.sync("latents")
    return EncodedClips(path, world, clips)


def _encode_shard(
    vae: WanVAE,
    params: Params,
    world: toy.World,
    clips: ClipsConfig,
    frames: int,
    path: pathlib.Path,
    index: int,
) -> None:
    video_frames, parts = vae.config.video_frames(frames), []
    for at in range(index * SHARD_CLIPS, (index + 1) * SHARD_CLIPS, _ENCODE_CLIPS):
        indices = np.arange(at, at + _ENCODE_CLIPS)
        scenes = toy.sample_scenes(world, seed=clips.seed, indices=indices, split=clips.split)
        parts.append(
            np.asarray(_encode(vae, params, toy.render(world, scenes, frames=video_frames)), np.float16)
        )
    with storage.new_file(_file(path, index)) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(parts))


def _key(vae: WanVAE, world: toy.World, clips: ClipsConfig, frames: int, fingerprint: str) -> str:
    content = {
        "vae": [fingerprint, to_dict(vae.config), str(vae.dtype)],
        "world": dataclasses.asdict(world),
        "clips": [clips.seed, clips.split, frames],
    }
    text = json.dumps(content, sort_keys=True)
    return f"{frames}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _file(folder: pathlib.Path, index: int) -> pathlib.Path:
    return folder / f"{index:05d}.npy"


@functools.lru_cache(maxsize=4096)
def _shard(folder: pathlib.Path, index: int) -> np.ndarray:
    return np.load(_file(folder, index), mmap_mode="r")


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: WanVAE, params: Params, video: Array) -> Array:
    result: Any = vae.apply({"params": params}, video, method="encode")
    return result
