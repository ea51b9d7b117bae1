"""The toy student in four steps: self-forcing distillation of single clips, with window and sink.

    longlive train configs/toy/init.py

Needs runs/toy/causal_init/export and, as the teacher, runs/toy/teacher/export.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    EvaluationConfig,
    InitTraining,
    OptimizerConfig,
    PromptsConfig,
    RunConfig,
    ScoresConfig,
)
from longlive_jax.training.losses import DMDConfig

BETAS = (0.0, 0.999)


def get_config() -> InitTraining:
    return InitTraining(
        model=preset("toy"),
        # No more: shapes hold from here on, but edges and holes get worse.
        run=RunConfig(
            folder="runs/toy/init", seed=1, steps=120, eval_every=60, checkpoint_every=60, export_every=60
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            schedule="constant",
            warmup_steps=10,
            betas=BETAS,
            clip_norm=10.0,
            ema_decay=0.97,
        ),
        critic_optimizer=OptimizerConfig(
            learning_rate=4e-4, schedule="constant", warmup_steps=10, betas=BETAS, clip_norm=10.0
        ),
        data=PromptsConfig(batch_size=8, seed=1),
        base="runs/toy/causal_init/export",
        # High noise levels: there the scores tell which shape. At a shift of 3 low ones have most of the
        # gradient; they sharpen what is there, and take faint sprites away.
        dmd=DMDConfig(guidance=3.0, shift=8.0, score_shift=8.0),
        scores=ScoresConfig(teacher="runs/toy/teacher/export", critic_updates=3, dtype="float32"),
        evaluation=EvaluationConfig(clips=32, frames=21, batch_size=32, metric="all", better="max"),
    )


def smoke(config: InitTraining) -> InitTraining:
    return presets.smoke(config, {"model.window.sink_frames": 3})
