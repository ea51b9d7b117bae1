"""The toy world's text encoder: 26 words, trained to name a caption's attributes, then frozen.

    longlive train configs/toy/text.py

A minute on one CPU core. Needs runs/toy/vae_decoder/export.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    ClipsConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TextTraining,
)


def get_config() -> TextTraining:
    return TextTraining(
        model=preset("toy"),
        run=RunConfig(folder="runs/toy/text", steps=600, eval_every=200, checkpoint_every=200),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        data=ClipsConfig(batch_size=64, frames=1),
        base="runs/toy/vae_decoder/export",
        evaluation=EvaluationConfig(metric="accuracy", better="max"),
    )


def smoke(config: TextTraining) -> TextTraining:
    return presets.smoke(config)
