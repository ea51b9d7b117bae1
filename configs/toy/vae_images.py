"""The toy world's autoencoder on single frames: 64 x 64 pixels to 8 x 8 x 16 latents.

longlive train configs/toy/vae_images.py
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
            folder="runs/toy/vae_images", steps=900, eval_every=150, checkpoint_every=50, export_every=250
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            warmup_steps=50,
            clip_norm=1.0,
            weight_decay=1e-4,
            ema_decay=0.99,
            ema_start=100,
        ),
        data=ClipsConfig(batch_size=32, frames=1),
        vae=VAELoss(latent_noise=0.15, latent_weight=0.0, anchor_weight=1.0),
        evaluation=EvaluationConfig(clips=64, frames=1, batch_size=32, metric="shape", better="max"),
    )


def smoke(config: VAETraining) -> VAETraining:
    return presets.smoke(config, {"data.frames": 1})
