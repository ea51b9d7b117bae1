"""The toy teacher, second part: other clips of one block; shapes go on rising long after colours are right.

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
            folder="runs/toy/teacher_2", steps=1600, eval_every=400, checkpoint_every=100, export_every=400
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=50, ema_decay=0.998, ema_start=50),
        data=ClipsConfig(batch_size=32, frames=3, examples=3072, seed=1),
        base="runs/toy/teacher_1/export",
        flow=FlowConfig(levels="logit_normal", guidance=2.0),
        evaluation=EvaluationConfig(clips=32, frames=3, batch_size=32, metric="all", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    return presets.smoke(config, {"data.frames": 6, "flow.encoded_frames": 6})
