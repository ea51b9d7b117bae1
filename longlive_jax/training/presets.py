"""What the config files share: the smoke form that shrinks a stage of the toy recipe to seconds."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from longlive_jax.config_dict import override
from longlive_jax.training.config import DistillTraining, FlowTraining, Training, VAETraining

T = TypeVar("T", bound=Training)

_RUN: Mapping[str, Any] = {
    "run.steps": 2,
    "run.log_every": 1,
    "run.eval_every": 0,
    "run.checkpoint_every": 1,
    "run.export_every": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "optimizer.schedule_steps": 0,
    "evaluation.clips": 2,
    "evaluation.frames": 3,
    "evaluation.batch_size": 2,
    "data.batch_size": 8,
}
_STAGES: Mapping[type[Training], Mapping[str, Any]] = {
    VAETraining: {
        "optimizer.ema_decay": 0.0,
        "data.examples": 8,
        "vae.statistics_clips": 2,
        "vae.latent_noise": 0.0,
    },
    FlowTraining: {"data.examples": 8, "flow.sample_steps": 2},
    DistillTraining: {
        "critic_optimizer.warmup_steps": 0,
        "scores.teacher": "runs/smoke/teacher/export",
        "rollout.clip_frames": 6,
        "model.window.window_frames": 6,
        "evaluation.frames": 6,
    },
}
_MODEL: Mapping[str, Any] = {
    "model.video.height": 16,
    "model.video.width": 16,
    "model.vae.dim": 4,
    "model.vae.dim_mult": (1, 1),
    "model.vae.temporal_downsample": (True,),
    "model.text_encoder.num_layers": 1,
    "model.transformer.dim": 32,
    "model.transformer.ffn_dim": 64,
    "model.transformer.num_heads": 2,
    "model.transformer.num_layers": 2,
    "model.transformer.freq_dim": 32,
}


def smoke(config: T, changes: Mapping[str, Any] | None = None) -> T:
    """A stage in two steps, over and over the same few clips, of a tiny model.

    Its run and its base are moved from `runs/toy` to `runs/smoke`, so the smoke forms of all stages
    build on each other as the stages do.

    Args:
      config: the stage's config.
      changes: dotted names to values, for what stages of its kind do not share.
    """
    moved = dataclasses.replace(config, base=_moved(config.base))
    folder = {"run.folder": _moved(config.run.folder)}
    kind = next((found for stage, found in _STAGES.items() if isinstance(config, stage)), {})
    return override(moved, {**_RUN, **_MODEL, **kind, **folder, **(changes or {})})


def _moved(path: str) -> str:
    parts = ["smoke" if part == "toy" else part for part in pathlib.PurePosixPath(path).parts]
    return str(pathlib.PurePosixPath(*parts)) if path else ""
