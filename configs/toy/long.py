"""The toy student over long videos: streaming long tuning on sequences of 57 latent frames, with a LoRA.

    longlive train configs/toy/long.py

Needs runs/toy/init/export and, as the teacher, runs/toy/teacher/export.
"""

from longlive_jax.config import preset
from longlive_jax.training import presets
from longlive_jax.training.config import (
    EvaluationConfig,
    LongTraining,
    LoRAConfig,
    OptimizerConfig,
    PromptsConfig,
    RunConfig,
    ScoresConfig,
    StreamingConfig,
)
from longlive_jax.training.losses import DMDConfig

BETAS = (0.0, 0.999)


def get_config() -> LongTraining:
    return LongTraining(
        model=preset("toy"),
        # The mean of the last exports is better than each of them (`make toy` goes on with it).
        run=RunConfig(
            folder="runs/toy/long", steps=540, checkpoint_every=60, export_every=60, keep_exports=True
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=10,
            betas=BETAS,
            clip_norm=10.0,
            ema_decay=0.97,
        ),
        critic_optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="constant", warmup_steps=10, betas=BETAS, clip_norm=10.0
        ),
        data=PromptsConfig(batch_size=8),
        base="runs/toy/init/export",
        dmd=DMDConfig(guidance=3.0, shift=8.0, score_shift=8.0),
        scores=ScoresConfig(teacher="runs/toy/teacher/export", critic_updates=3, dtype="float32"),
        lora=LoRAConfig(rank=32),
        # At the paper's 240 frames one clip in fourteen follows a switch, here one in three does. This model
        # holds 240 frames without having seen them; what it has to learn is to switch.
        streaming=StreamingConfig(sequence_frames=57, switch_frames=(21, 39)),
        evaluation=EvaluationConfig(clips=8, frames=21, batch_size=8, metric="all", better="max"),
    )


def smoke(config: LongTraining) -> LongTraining:
    changes = {
        "lora.rank": 4,
        "streaming.sequence_frames": 18,
        "streaming.new_frames": (3,),
        "streaming.switch_frames": (6, 9, 12),
    }
    return presets.smoke(config, changes)
