"""Running cells: one condition with one seed, generated through the public pipeline and measured."""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import memory
from longlive_jax.checkpoint import Checkpoint, open_checkpoint
from longlive_jax.config import PipelineConfig
from longlive_jax.config_dict import to_dict
from longlive_jax.errors import require
from longlive_jax.experiments import store
from longlive_jax.experiments.metrics import METRICS, Batch
from longlive_jax.experiments.study import Condition, Study
from longlive_jax.experiments.tasks import Work, task_key
from longlive_jax.inference import rollout
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import check_schedule
from longlive_jax.provenance import fingerprints
from longlive_jax.toy.evaluation import Table
from longlive_jax.video import open_writer

# Sections of the config that say how weights generate: they change without these being loaded again.
_FREE = ("window", "sampler", "switch", "video")

VIDEOS = "videos"
"""Folder of the videos that are kept."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One condition with one seed.

    Attributes:
      study: what it belongs to.
      condition: what is compared.
      seed: of the prompts and the noise.
      checkpoint: the open checkpoint.
      config: what it generates with.
      work: what it generates.
      key: everything its numbers depend on.
      file: where they are stored.
    """

    study: Study
    condition: Condition
    seed: int
    checkpoint: Checkpoint
    config: PipelineConfig
    work: Work
    key: Mapping[str, Any]
    file: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.condition.label}, seed {self.seed}"

    @property
    def frames(self) -> int:
        """Latent frames of all clips."""
        return self.study.task.frames * self.study.clips

    @property
    def is_stored(self) -> bool:
        return self.file.is_file()


def plan(study: Study, folder: pathlib.Path) -> list[Cell]:
    """Every cell of a study, all seeds of a condition after each other; opens checkpoints, loads nothing.

    Raises:
      UserError: a checkpoint is missing, a condition does not fit it, or checkpoints generate differently in
        what the study does not vary.
    """
    opened = functools.cache(open_checkpoint)
    conditions = study.conditions()
    configs = [condition.resolve(opened(condition.checkpoint).config) for condition in conditions]
    _check_alike(conditions, configs)
    cells = []
    for condition, config in zip(conditions, configs, strict=True):
        checkpoint = opened(condition.checkpoint)
        config.window.cache_frames(study.task.frames)
        blocks = study.task.frames // config.window.block_frames
        for name in study.metrics:
            require(
                blocks >= METRICS[name].blocks,
                f"task.frames={study.task.frames}: metric {name} needs {METRICS[name].blocks} blocks of "
                f"{config.window.block_frames}",
            )
        work = [study.task.work(config, clips=study.clips, seed=seed) for seed in study.seeds]
        for one in work:
            for story in one.stories:
                check_schedule(story, frames=study.task.frames, block_frames=config.window.block_frames)
        for seed, one in zip(study.seeds, work, strict=True):
            key = cell_key(study, condition, config, checkpoint, seed, task_key(study.task, work))
            file = store.file_of(folder, condition.label, key)
            cells.append(Cell(study, condition, seed, checkpoint, config, one, key, file))
    return cells


def _check_alike(conditions: Sequence[Condition], configs: Sequence[PipelineConfig]) -> None:
    """Refuses to compare checkpoints that differ in how they generate besides what the study varies."""
    varied = {name for condition in conditions for name in condition.settings}
    for section in _FREE:
        for field in dataclasses.fields(getattr(configs[0], section)):
            name = f"{section}.{field.name}"
            values = [getattr(getattr(config, section), field.name) for config in configs]
            other = next((i for i, value in enumerate(values) if value != values[0]), 0)
            require(
                other == 0 or name in varied,
                f"checkpoints differ in {name}: {values[0]} ({conditions[0].label}), {values[other]} "
                f"({conditions[other].label}); name one in the study's settings, or make it an axis",
            )


def cell_key(
    study: Study,
    condition: Condition,
    config: PipelineConfig,
    checkpoint: Checkpoint,
    seed: int,
    task: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything a cell's numbers depend on."""
    return {
        "config": to_dict(config),
        "weights": fingerprints(checkpoint),
        "use_lora": condition.use_lora,
        "task": dict(task),
        "metrics": list(study.metrics),
        "models": dict(study.models),
        "clips": study.clips,
        "batch": study.batch if "speed" in study.metrics else None,
        "seed": seed,
    }


class Pipelines:
    """The pipelines of cells, on one device: conditions that share their weights load them once."""

    def __init__(self) -> None:
        self._key = ""
        self._base: Pipeline | None = None

    def open(self, cell: Cell, prompts: Sequence[str]) -> Pipeline:
        """The pipeline of a cell.

        Args:
          cell: the cell.
          prompts: of all cells with this checkpoint: they are encoded together when it is loaded, so that
            the text encoder is loaded once.
        """
        fixed = {name: value for name, value in to_dict(cell.config).items() if name not in _FREE}
        key = json.dumps([str(cell.checkpoint.path), cell.condition.use_lora, fixed], sort_keys=True)
        if self._base is None or key != self._key:
            self._base = None  # frees the weights before the next ones come
            self._base = Pipeline.load(
                cell.condition.checkpoint,
                overrides=cell.condition.settings,
                use_lora=cell.condition.use_lora,
            )
            self._base.check_vae()
            self._base.encode_prompts(list(dict.fromkeys(prompts)))
            self._key = key
        return dataclasses.replace(self._base, config=cell.config)


def run_cell(
    cell: Cell, pipe: Pipeline, *, advance: Callable[[int], None], keep: pathlib.Path | None
) -> None:
    """Generates, measures and stores one cell.

    Args:
      cell: what to run.
      pipe: its pipeline.
      advance: told the latent frames of all clips as they are made; what it raises ends the cell.
      keep: folder for the videos that are kept, or None.
    """
    study, started = cell.study, time.monotonic()
    tables: list[Table] = []
    for first in range(0, study.clips, study.batch):
        work = cell.work.rows(first, study.batch)
        videos, latents, seconds = generate(pipe, work, study.task.frames, advance)
        batch = Batch(
            config=cell.config,
            task=study.task,
            work=work,
            videos=videos,
            latents=latents,
            block_seconds=seconds,
            weight_bytes=memory.tree_bytes(pipe.params),
            cache_bytes=cache_bytes(pipe, study.task.frames),
            models=study.models,
        )
        table: dict[str, np.ndarray] = {}
        for name in study.metrics:
            table |= METRICS[name].measure(batch)
        tables.append(table)
        if keep is not None:
            for index in range(first, min(first + study.batch, study.kept_videos)):
                save_video(video_file(keep, cell.condition, index), videos[index - first], pipe)
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    store.write(
        cell.file,
        cell.key,
        joined,
        seconds=time.monotonic() - started,
        frames=cell.frames,
        prompts=[story.prompts for story in cell.work.stories[: study.kept_videos]],
    )


def generate(
    pipe: Pipeline, work: Work, frames: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Makes the videos of one batch.

    Returns:
      uint8 `[B, V, Y, X, 3]`, float32 `[B, F, h, w, C]`, and the seconds of the median block. The first
      block, which compiles, does not count; with fewer than three it is not a number.
    """
    videos, latents, seconds = [], [], []
    last = None
    for chunk in pipe.stream(list(work.stories), frames=frames, seed=list(work.seeds)):
        now = time.monotonic()
        if last is not None:
            seconds.append(now - last)
        last = now
        videos.append(chunk.video)
        latents.append(chunk.latents)
        advance(chunk.latents.shape[0] * chunk.latents.shape[1])
    median = statistics.median(seconds[1:]) if len(seconds) > 1 else math.nan
    return np.concatenate(videos, axis=1), np.concatenate(latents, axis=1), median


def cache_bytes(pipe: Pipeline, frames: int) -> int:
    """Bytes of the keys and values of one video of `frames` latent frames, from shapes."""
    config = pipe.config
    shape = config.transformer
    state = jax.eval_shape(
        functools.partial(
            rollout.init,
            pipe.generator,
            latent_size=config.latent_size(config.video.height, config.video.width),
            total_frames=frames,
        ),
        pipe.params,
        jax.ShapeDtypeStruct((1, shape.text_len, shape.text_dim), jnp.dtype(config.dtype)),
        jax.ShapeDtypeStruct((1,), jnp.uint32),
    )
    return memory.tree_bytes(state.cache)


def video_file(folder: pathlib.Path, condition: Condition, index: int) -> pathlib.Path:
    """Where video `index` of a condition is kept."""
    return folder / f"{store.slug(condition.label)}-{index}.mp4"


def save_video(path: pathlib.Path, video: np.ndarray, pipe: Pipeline) -> None:
    """Writes one video, uint8 `[V, Y, X, 3]`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_writer(path, fps=pipe.config.video.fps, height=video.shape[1], width=video.shape[2]) as writer:
        writer.write(video)


def blocks_timed(pipe: Pipeline, work: Work, *, blocks: int) -> Iterator[float]:
    """Seconds until each of the first blocks of a batch is there."""
    frames = blocks * pipe.config.window.block_frames
    stories = [story.prompt for story in work.stories]
    last = time.monotonic()
    for _ in pipe.stream(stories, frames=frames, seed=list(work.seeds)):
        now = time.monotonic()
        yield now - last
        last = now
