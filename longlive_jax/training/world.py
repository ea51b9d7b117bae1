"""What the stages share that knows the toy world: its size, its clips, and the score of a video."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from grain.sharding import ShardOptions

from longlive_jax import toy
from longlive_jax.config import PipelineConfig
from longlive_jax.toy import data
from longlive_jax.training.config import ClipsConfig

REFERENCE_SIDE = 64
"""Pixels of the shorter side for which the toy world's sizes and speed are given."""


def world_of(config: PipelineConfig) -> toy.World:
    """The toy world at a model's frame size; sprites, lanes and speed scale with the shorter side."""
    video = config.video
    scale = min(video.height, video.width) / REFERENCE_SIDE
    usual = toy.World()
    low, high = usual.size_range
    return toy.World(
        height=video.height,
        width=video.width,
        fps=video.fps,
        speed=usual.speed * scale,
        size_range=(low * scale, high * scale),
        lane_margin=usual.lane_margin * scale,
    )


def stream_config(clips: ClipsConfig) -> data.DataConfig:
    """The data set's own settings."""
    return data.DataConfig(
        batch_size=clips.batch_size,
        seed=clips.seed,
        split=clips.split,
        examples=clips.examples,
        threads=clips.threads,
        prefetch=clips.prefetch,
    )


class Endings(NamedTuple):
    """What clips end with.

    Attributes:
      codes: attributes, int32 `[B, 4]`.
      template: phrasing of their caption, int `[B]`.
      begin: latent frame from which on they hold, int32 `[B]`; 0 in clips that do not switch.
    """

    codes: np.ndarray
    template: np.ndarray
    begin: np.ndarray


@dataclasses.dataclass(frozen=True)
class Switches:
    """Which clips of a data set switch to other attributes, and where.

    Attributes:
      share: of the clips, in (0, 1].
      frames: latent frames that may be the first with the new attributes.
    """

    share: float
    frames: tuple[int, ...]

    def of(self, clips: ClipsConfig, indices: np.ndarray, scenes: toy.Scenes) -> Endings:
        """What the clips `[B]`, which begin with `scenes`, end with."""
        begin = data.switch_places(self.frames, share=self.share, seed=clips.seed, indices=indices)
        codes, template = data.switches(scenes.codes, seed=clips.seed, indices=indices, split=clips.split)
        switched = begin > 0
        return Endings(
            np.where(switched[:, None], codes, scenes.codes),
            np.where(switched, template, scenes.template),
            begin,
        )


def shard() -> ShardOptions:
    """This process's share of every batch."""
    return ShardOptions(shard_index=jax.process_index(), shard_count=jax.process_count())


def held_out_scenes(world: toy.World, *, clips: int, seed: int) -> toy.Scenes:
    """Scenes whose combinations of attributes training never shows."""
    return toy.sample_scenes(world, seed=seed, indices=np.arange(clips), split="held_out")


def adherence(world: toy.World, video: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    """Share of frames that show what was asked for, by attribute, and the shape's mean overlap.

    Args:
      world: geometry.
      video: float `[B, V, Y, X, 3]` in [-1, 1].
      codes: int `[B, 4]`, what was asked for.

    Returns:
      {"shape", "colour", "motion", "background", "all", "iou"}, each in [0, 1]. Clips too short for a
      motion to be read score 0 there.
    """
    readings = toy.read(world, np.asarray(video, np.float32))
    right = readings.codes == codes[:, None]  # [B, V, 4]
    scores = {name: float(right[..., i].mean()) for i, name in enumerate(toy.FIELDS)}
    return scores | {"all": float(right.all(-1).mean()), "iou": float(readings.iou.mean())}


def caption_table() -> list[str]:
    """Every caption of the world and, last, the empty one; `caption_rows` finds a scene's."""
    every = toy.combinations("all")
    templates = range(toy.world.TEMPLATE_COUNT)
    return [toy.describe(toy.Attributes.from_codes(row), template=t) for row in every for t in templates] + [
        ""
    ]


def caption_rows(codes: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Rows of `caption_table`, int32 `[B]`.

    Args:
      codes: attributes, int `[B, 4]`.
      template: phrasing, int `[B]`.
    """
    sizes = [len(toy.VALUES[field]) for field in toy.FIELDS]
    return (np.ravel_multi_index(codes.T, sizes) * toy.world.TEMPLATE_COUNT + template).astype(np.int32)
