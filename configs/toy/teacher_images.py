"""The toy teacher, to begin with: single frames, three times as many scenes for the same work.

    longlive train configs/toy/teacher_images.py

Needs runs/toy/text/export.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    ClipsConfig,
    EvaluationConfig,
    FlowConfig,
    OptimizerConfig,
    RunConfig,
    TeacherTraining,
)


def get_config() -> TeacherTraining:
    return TeacherTraining(
        model=preset("toy"),
        run=RunConfig(
            folder="runs/toy/teacher_images",
            steps=2000,
            eval_every=500,
            checkpoint_every=100,
            export_every=500,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998, ema_start=200),
        data=ClipsConfig(batch_size=48, frames=1, examples=16384),
        base="runs/toy/text/export",
        flow=FlowConfig(),
        evaluation=EvaluationConfig(clips=64, frames=1, batch_size=32, metric="shape", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    return presets.smoke(config, {"data.frames": 1, "flow.encoded_frames": 0})
