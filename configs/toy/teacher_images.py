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
            steps=6000,
            eval_every=1000,
            checkpoint_every=100,
            export_every=1000,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998, ema_start=200),
        data=ClipsConfig(batch_size=48, frames=1, examples=24576),
        base="runs/toy/text/export",
        flow=FlowConfig(),
        evaluation=EvaluationConfig(clips=64, frames=1, batch_size=32, metric="shape", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    changes = {
        "data.batch_size": 8,
        "data.examples": 8,
        "data.frames": 1,
        "flow.encoded_frames": 0,
        "flow.sample_steps": 2,
    }
    return presets.smoke(config, changes)
