"""The toy student before distillation, the other way: by regression of the teacher's trajectories.

    longlive train configs/toy/causal_ode.py

Needs runs/toy/teacher/export. Not a part of the recipe: docs/training.md compares it with causal_init.py.
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
            folder="runs/toy/causal_ode", steps=2000, eval_every=500, checkpoint_every=100, export_every=500
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=50, ema_decay=0.998),
        # A trajectory costs as many passes as ten updates with it do: a few, each seen four times.
        data=ClipsConfig(batch_size=4, frames=21, examples=2048),
        base="runs/toy/teacher/export",
        flow=CausalFlowConfig(method="ode", text_dropout=0.0, past_noise=0.1, guidance=4.0),
        evaluation=EvaluationConfig(clips=32, frames=21, batch_size=8, metric="all", better="max"),
    )


def smoke(config: CausalInitTraining) -> CausalInitTraining:
    return presets.smoke(config, {"data.frames": 6})
