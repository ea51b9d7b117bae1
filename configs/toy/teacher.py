"""The toy teacher, third part: whole clips of 21 latent frames.

    longlive train configs/toy/teacher_3.py

Needs runs/toy/teacher_2/export.
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
            folder="runs/toy/teacher_3", steps=1500, eval_every=300, checkpoint_every=100, export_every=300
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, ema_decay=0.999),
        data=ClipsConfig(batch_size=4, frames=21, examples=768),
        base="runs/toy/teacher_2/export",
        flow=FlowConfig(levels="logit_normal", guidance=2.0, encoded_frames=21),
        evaluation=EvaluationConfig(clips=32, frames=21, batch_size=8, metric="all", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    return presets.smoke(config, {"data.frames": 6, "flow.encoded_frames": 6})
