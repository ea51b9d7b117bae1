"""The toy world's video autoencoder: 64 x 64 pixels to 8 x 8 x 16 latents, four frames to one.

    longlive train configs/toy/vae.py

Needs runs/toy/vae_images/export.
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
            folder="runs/toy/vae", steps=450, eval_every=150, checkpoint_every=50, export_every=250
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
        base="runs/toy/vae_images/export",
        vae=VAELoss(latent_noise=0.15, latent_weight=0.0, anchor_weight=1.0),
        evaluation=EvaluationConfig(clips=16, frames=9, batch_size=4, metric="all", better="max"),
    )


def smoke(config: VAETraining) -> VAETraining:
    return presets.smoke(config, {"data.frames": 2})
