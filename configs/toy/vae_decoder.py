"""The decoder of the toy video autoencoder alone, for sharper frames; the latents stay as they are.

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
            folder="runs/toy/vae_decoder", steps=1200, eval_every=250, checkpoint_every=50, export_every=250
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
        vae=VAELoss(trained="decoder"),
        evaluation=EvaluationConfig(clips=16, frames=9, batch_size=4, metric="all", better="max"),
    )


def smoke(config: VAETraining) -> VAETraining:
    changes = {
        "optimizer.ema_decay": 0.0,
        "data.batch_size": 8,
        "data.examples": 8,
        "data.frames": 2,
        "vae.statistics_clips": 2,
        "vae.latent_noise": 0.0,
    }
    return presets.smoke(config, changes)
