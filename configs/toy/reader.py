"""What stage `reward` rewards by: a network that reads shape, colour, motion and background from latents.

    longlive train configs/toy/reader.py

Needs the VAE of runs/toy/vae_decoder/export; with base=toy that of the bundled model, the same.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    ClipsConfig,
    EvaluationConfig,
    OptimizerConfig,
    ReaderTraining,
    RunConfig,
)


def get_config() -> ReaderTraining:
    return ReaderTraining(
        model=preset("toy"),
        run=RunConfig(folder="runs/toy/reader", steps=5000, eval_every=1000, checkpoint_every=500),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.05, warmup_steps=50),
        data=ClipsConfig(batch_size=32, frames=6, examples=6144, seed=3, threads=2),
        base="runs/toy/vae_decoder/export",
        evaluation=EvaluationConfig(clips=256, metric="all", better="max"),
    )


def smoke(config: ReaderTraining) -> ReaderTraining:
    return presets.smoke(
        config, {"data.examples": 8, "data.frames": 3, "reader.dim": 8, "evaluation.clips": 16}
    )
