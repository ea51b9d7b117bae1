"""The toy student before distillation: the teacher's weights, made causal by teacher forcing.

    longlive train configs/toy/causal_init.py

Needs runs/toy/teacher/export.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    CausalFlowConfig,
    CausalInitTraining,
    ClipsConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
)


def get_config() -> CausalInitTraining:
    return CausalInitTraining(
        model=preset("toy"),
        run=RunConfig(
            folder="runs/toy/causal_init", steps=2750, eval_every=500, checkpoint_every=250, export_every=500
        ),
        # As the bundled model's: stopped before its rate was down.
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule_steps=3000, warmup_steps=100, ema_decay=0.998),
        data=ClipsConfig(batch_size=32, frames=21, examples=4096),
        base="runs/toy/teacher/export",
        flow=CausalFlowConfig(levels="logit_normal", past_noise=0.1, guidance=2.0, encoded_frames=21),
        evaluation=EvaluationConfig(clips=32, frames=21, batch_size=32, metric="all", better="max"),
    )


def smoke(config: CausalInitTraining) -> CausalInitTraining:
    return presets.smoke(config, {"data.frames": 6, "flow.encoded_frames": 6})
