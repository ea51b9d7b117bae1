"""The toy teacher, second part: clips of 9 latent frames.

    longlive train configs/toy/teacher_2.py

Needs runs/toy/teacher_1/export.
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
            folder="runs/toy/teacher_2", steps=1000, eval_every=300, checkpoint_every=100, export_every=300
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, ema_decay=0.998),
        data=ClipsConfig(batch_size=8, frames=9, examples=2048),
        base="runs/toy/teacher_1/export",
        flow=FlowConfig(encoded_frames=21),
        evaluation=EvaluationConfig(clips=32, frames=9, batch_size=16, metric="all", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    return presets.smoke(config, {"data.frames": 6, "flow.encoded_frames": 6})
