"""The settings of the paper's two distillation runs (arXiv 2509.22622; configs of release v1.0).

64 devices of 80 GB: every group of 8 shares the weights (`fsdp`), the 8 groups share the batch (`data`).
"""

from longlive_jax.config import PipelineConfig, preset
from longlive_jax.training.config import (
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    PromptsConfig,
    ScoresConfig,
)

PROMPTS = "prompts/vidprom_filtered_extended.txt"
SWITCH_PROMPTS = "prompts/vidprom_filtered_extended_switch.txt"

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
    "杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""Wan2.1's default, for which its guidance is tuned."""

STUDENT: PipelineConfig = preset("wan_1_3b")
MESH = MeshConfig(data=8, fsdp=8)
SCORES = ScoresConfig(
    teacher="checkpoints/wan2.1-t2v-14b",
    teacher_preset="wan_14b",
    critic="checkpoints/wan2.1-t2v-1.3b",
    negative_prompt=NEGATIVE_PROMPT,
)
EVALUATION = EvaluationConfig(clips=4, frames=21, batch_size=1)


def optimizer(learning_rate: float, *, ema_decay: float = 0.0) -> OptimizerConfig:
    """AdamW as both networks have it; the average begins with update 40, the release's iteration 200."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        schedule="constant",
        betas=(0.0, 0.999),
        clip_norm=10.0,
        ema_decay=ema_decay,
        ema_start=40,
    )


def prompts(*, with_switch: bool) -> PromptsConfig:
    """64 prompts per update."""
    return PromptsConfig(batch_size=64, prompts=PROMPTS, switch_prompts=SWITCH_PROMPTS if with_switch else "")
