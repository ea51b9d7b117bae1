"""The toy student tuned by a reward: towards blocks in which the prompt can be read, a switch's included.

    longlive train configs/toy/reward.py

Needs runs/toy/long/mean (`make toy`) and runs/toy/reader/export; with base=toy it begins with the bundled
model.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    EvaluationConfig,
    LoRAConfig,
    OptimizerConfig,
    PromptsConfig,
    RewardConfig,
    RewardTraining,
    RolloutConfig,
    RunConfig,
    StreamingConfig,
)


def get_config() -> RewardTraining:
    return RewardTraining(
        model=preset("toy"),
        run=RunConfig(
            folder="runs/toy/reward",
            steps=600,
            checkpoint_every=60,
            eval_every=120,
            export_every=120,
            keep_exports=True,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=10,
            weight_decay=0.0,
            clip_norm=50.0,
            ema_decay=0.97,
        ),
        data=PromptsConfig(batch_size=16, seed=7),
        base="runs/toy/long/mean",
        reward=RewardConfig(reader="runs/toy/reader/export"),
        # What opens a video and what follows a switch is what goes wrong: short sequences have most of both.
        rollout=RolloutConfig(clip_frames=12),
        streaming=StreamingConfig(sequence_frames=30, new_frames=(9,), switch_frames=(6, 9, 12, 15, 18, 21)),
        lora=LoRAConfig(rank=32),
        evaluation=EvaluationConfig(clips=32, frames=21, batch_size=32, metric="all", better="max"),
    )


def smoke(config: RewardTraining) -> RewardTraining:
    changes = {
        "lora.rank": 4,
        "reward.reader": "runs/smoke/reader/export",
        "rollout.clip_frames": 6,
        "model.window.window_frames": 6,
        "streaming.sequence_frames": 12,
        "streaming.new_frames": (3,),
        "streaming.switch_frames": (3, 6),
        "evaluation.frames": 6,
    }
    return presets.smoke(config, changes)
