"""The toy teacher, first part: clips of one block (3 latent frames), where shapes and motions are learned.

    longlive train configs/toy/teacher_block.py

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
            folder="runs/toy/teacher_block",
            steps=3000,
            eval_every=1000,
            checkpoint_every=500,
            export_every=1000,
        ),
        # As the bundled model's: stopped before its rate was down.
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule_steps=5000, warmup_steps=200, ema_decay=0.999, ema_start=500
        ),
        data=ClipsConfig(batch_size=64, frames=3, examples=4096),
        base="runs/toy/text/export",
        flow=FlowConfig(levels="logit_normal", frame_levels=0.5, guidance=2.0, encoded_frames=21),
        evaluation=EvaluationConfig(clips=32, frames=3, batch_size=32, metric="all", better="max"),
    )


def smoke(config: TeacherTraining) -> TeacherTraining:
    return presets.smoke(config, {"data.frames": 3, "flow.encoded_frames": 6})
