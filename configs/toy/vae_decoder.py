"""The toy world's video decoder once more, alone, for sharper frames of the same latents.

    longlive train configs/toy/vae_decoder.py

Needs runs/toy/vae/export.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    ClipsConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    VAELoss,
    VAETraining,
)


def get_config() -> VAETraining:
    return VAETraining(
        model=preset("toy"),
        run=RunConfig(
            folder="runs/toy/vae_decoder", steps=1500, eval_every=250, checkpoint_every=50, export_every=500
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=50,
            clip_norm=1.0,
            weight_decay=1e-4,
            ema_decay=0.99,
            ema_start=100,
        ),
        data=ClipsConfig(batch_size=4, frames=3),
        base="runs/toy/vae/export",
        vae=VAELoss(latent_noise=0.15, trained="decoder"),
        evaluation=EvaluationConfig(clips=32, frames=9, batch_size=4, metric="all", better="max"),
    )


def smoke(config: VAETraining) -> VAETraining:
    return presets.smoke(config, {"data.frames": 2})
