"""The metrics of studies: from a batch of videos to numbers per clip.

A metric has a function of a `Batch` that returns a table: measure to values `[B]`, or `[B, W]` with windows
or blocks along the video; not a number where a measure does not apply to a clip. `METRICS` is the only
place that lists them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from longlive_jax import toy
from longlive_jax.config import PipelineConfig
from longlive_jax.experiments.tasks import Scenes, Segments, Switch, Task, Work
from longlive_jax.toy import evaluation
from longlive_jax.toy.evaluation import Table
from longlive_jax.training.world import world_of


@dataclasses.dataclass(frozen=True)
class Batch:
    """Videos made side by side, and what was asked for.

    Attributes:
      config: what they were generated with.
      task: what they were generated for.
      work: their prompts.
      videos: uint8 `[B, V, Y, X, 3]`.
      latents: float32 `[B, F, h, w, C]`.
      block_seconds: seconds of the median block, all videos together; not a number for a single block.
      weight_bytes: of the transformer's parameters as they are held.
      cache_bytes: of the keys and values of one video.
      models: metric to the network it measures with.
    """

    config: PipelineConfig
    task: Task
    work: Work
    videos: np.ndarray
    latents: np.ndarray
    block_seconds: float
    weight_bytes: int = 0
    cache_bytes: int = 0
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Latent frames."""
        return self.latents.shape[1]

    @functools.cached_property
    def readings(self) -> toy.Readings:
        """What the pixels say, where they show the toy world."""
        return evaluation.read_pixels(world_of(self.config), self.videos)

    @property
    def codes(self) -> np.ndarray:
        """What the prompts ask for in the toy world, int `[B, prompts, 4]`."""
        assert self.work.codes is not None, "checked with the study: a metric of the toy world has its tasks"
        return self.work.codes


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric and what it needs.

    Attributes:
      measure: from a batch to a table.
      tasks: the kinds of task it is for; empty is all.
      blocks: fewest blocks of a video.
      per_run: its measures that have one value per condition and seed, not one per clip.
      needs_model: whether it measures with a network, which `Study.models` names.
    """

    measure: Callable[[Batch], Table]
    tasks: tuple[type, ...] = ()
    blocks: int = 1
    per_run: tuple[str, ...] = ()
    needs_model: bool = False


def adherence(batch: Batch) -> Table:
    """Adherence, identity, drift and flicker of clips with one prompt: see `toy.evaluation.measure_clips`."""
    return evaluation.measure_clips(
        world_of(batch.config),
        batch.readings,
        batch.codes[:, 0],
        vae=batch.config.vae,
        frames=batch.frames,
        window_frames=min(12, batch.frames),
        end_frames=min(21, batch.frames),
    )


def switch(batch: Batch) -> Table:
    """What one prompt switch does: see `toy.evaluation.measure_switches`."""
    codes, starts = batch.codes, batch.work.starts
    assert starts is not None
    return evaluation.measure_switches(
        world_of(batch.config),
        batch.readings,
        old=codes[:, 0],
        new=codes[:, 1],
        vae=batch.config.vae,
        frames=batch.frames,
        switch_frame=starts[1],
        block_frames=batch.config.window.block_frames,
    )


def segments(batch: Batch) -> Table:
    """Adherence in every segment of a story.

    `segments.shape` etc.: share of the segment's frames that show it; `segments.all`: all four; and
    `settled.all`: the same without the segment's first two blocks, in which the new prompt may still come.
    `story.all`, `story.settled`: over the whole story. `segments.present`: frames with a sprite.
    """
    codes, starts, vae = batch.codes, batch.work.starts, batch.config.vae
    assert starts is not None
    ends = (*starts[1:], batch.frames)
    spans = [evaluation.video_span(vae, *ends_of) for ends_of in zip(starts, ends, strict=True)]
    lengths = [end - begin for begin, end in spans]
    targets = np.repeat(codes, lengths, axis=1)  # [B, V, 4]
    grace = vae.temporal_stride * batch.config.window.block_frames * evaluation.GRACE_BLOCKS
    world = world_of(batch.config)
    right = toy.scores.matches(world, batch.readings, targets)  # [B, V, 4]
    table: dict[str, np.ndarray] = {}

    def means(values: np.ndarray, skipped: int = 0) -> np.ndarray:
        """`[B, V]` to `[B, segments]`."""
        begins = [min(begin + skipped, end - 1) for begin, end in spans]
        return np.stack([values[:, b:end].mean(1) for b, (_, end) in zip(begins, spans, strict=True)], axis=1)

    for i, name in enumerate(toy.FIELDS):
        table[f"segments.{name}"] = means(right[..., i])
    every: np.ndarray = np.asarray(right.all(-1))
    table["segments.all"] = means(every)
    table["settled.all"] = np.concatenate([means(every)[:, :1], means(every, grace)[:, 1:]], axis=1)
    table["segments.present"] = means(batch.readings.present)
    table["story.all"], table["story.settled"] = every.mean(1), table["settled.all"].mean(1)
    return table


def collapse(batch: Batch) -> Table:
    """Whether the picture snaps back to the sink: the distance of every block's latents from the first block.

    `blocks.distance`: root mean square, over the clip's median. `collapse.max` and `collapse.mean`: largest
    and mean fall of it from one block to the next, 0 where it never falls. A moving sprite that comes past
    where it started falls too, so compare conditions, which show the same scenes.
    """
    block = batch.config.window.block_frames
    whole = batch.frames // block
    clips, shape = len(batch.latents), batch.latents.shape[2:]
    blocks = batch.latents[:, : whole * block].reshape(clips, whole, block, *shape)
    away = (blocks - blocks[:, :1])[:, 1:]
    distance = np.sqrt((away**2).mean(axis=(2, 3, 4, 5)))  # [B, blocks - 1]
    distance = distance / np.maximum(np.median(distance, axis=1, keepdims=True), 1e-6)
    fall = np.maximum(-np.diff(distance, axis=1), 0)
    return {"blocks.distance": distance, "collapse.max": fall.max(1), "collapse.mean": fall.mean(1)}


def speed(batch: Batch) -> Table:
    """`frames_per_second`: video frames of all clips of a batch together, by the median block."""
    per_block = batch.config.vae.temporal_stride * batch.config.window.block_frames * len(batch.videos)
    return {"frames_per_second": np.full(len(batch.videos), per_block / batch.block_seconds)}


def size(batch: Batch) -> Table:
    """`weights_megabytes` of the transformer as it is held, and `cache_megabytes` of one video."""
    megabytes = {"weights_megabytes": batch.weight_bytes / 1e6, "cache_megabytes": batch.cache_bytes / 1e6}
    return {name: np.full(len(batch.videos), value) for name, value in megabytes.items()}


def clip_score(batch: Batch) -> Table:
    """Agreement of video and text by CLIP: see `features.clip_scores`. Needs the extra "metrics"."""
    from longlive_jax.experiments import features

    return features.clip_scores(batch)


def temporal_consistency(batch: Batch) -> Table:
    """Steadiness of image features: see `features.consistency`. Needs the extra "metrics"."""
    from longlive_jax.experiments import features

    return features.consistency(batch)


METRICS: Mapping[str, Metric] = {
    "adherence": Metric(adherence, tasks=(Scenes,)),
    "switch": Metric(switch, tasks=(Switch,)),
    "segments": Metric(segments, tasks=(Segments, Switch)),
    "collapse": Metric(collapse, blocks=3),
    "speed": Metric(speed, blocks=3, per_run=("frames_per_second",)),
    "size": Metric(size, per_run=("weights_megabytes", "cache_megabytes")),
    "clip_score": Metric(clip_score, needs_model=True),
    "temporal_consistency": Metric(temporal_consistency, needs_model=True),
}
"""Every metric by its name in a study's `metrics`."""

PER_RUN = tuple(name for metric in METRICS.values() for name in metric.per_run)
"""Measures that have one value per condition and seed."""
