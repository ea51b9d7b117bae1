"""The toy teacher, first part: clips of one block (3 latent frames), where shapes are learned fastest.

    longlive train configs/toy/teacher_1.py

Needs runs/toy/teacher_images/export.
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
            folder="runs/toy/teacher_1", steps=2500, eval_every=500, checkpoint_every=100, export_every=500
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998, ema_start=200),
        data=ClipsConfig(batch_size=32, frames=3, examples=3072),
        base="runs/toy/teacher_images/export",
        flow=FlowConfig(levels="logit_normal"),
        evaluation=EvaluationConfig(clips=32, frames=3, batch_size=32, metric="all", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    return presets.smoke(config, {"data.frames": 3, "flow.encoded_frames": 0})
