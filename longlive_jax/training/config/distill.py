"""Configs of the stages of distribution matching: `init` and `long`."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from longlive_jax.config import PRESETS, PipelineConfig, TransformerConfig
from longlive_jax.config import preset as preset_of
from longlive_jax.errors import require
from longlive_jax.training.config.shared import (
    READ_FROM_PIXELS,
    OptimizerConfig,
    PromptsConfig,
    Training,
    at_least,
)
from longlive_jax.training.losses import DMDConfig


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation in place of training all weights.

    Attributes:
      rank: of the update of every linear layer of every block; 0 trains all weights.
      alpha: the update is alpha / rank * B A; 0 stands for the rank.
      is_critic_adapted: whether the critic is adapted too, or trained whole.
    """

    rank: int = 0
    alpha: float = 0.0
    is_critic_adapted: bool = True

    def __post_init__(self) -> None:
        at_least("lora", self, rank=0, alpha=0)

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return (self.alpha or self.rank) / self.rank if self.rank else 1.0


CacheGradient = Literal["straight_through", "opening", "none"]
TextGradient = Literal["full", "none"]


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the generator makes its clips; window and sampler are the model's.

    Attributes:
      clip_frames: latent frames of a clip as teacher and critic see it.
      cache_gradient: see `training.rollout.SelfForcing`.
      text_gradient: see there.
      renoise_context: see there.
      is_exit_shared: one exit step for all blocks of a clip, or one for each.
    """

    clip_frames: int = 21
    cache_gradient: CacheGradient = "straight_through"
    text_gradient: TextGradient = "full"
    renoise_context: bool = True
    is_exit_shared: bool = True

    def __post_init__(self) -> None:
        at_least("rollout", self, clip_frames=1)


@dataclasses.dataclass(frozen=True)
class ScoresConfig:
    """Whose scores distribution matching compares.

    Attributes:
      teacher: checkpoint directory of the teacher's transformer; "" is `base`.
      teacher_preset: preset with the shape of the teacher's transformer; "" is that of the model.
      critic: checkpoint directory with the transformer the critic begins as; "" takes the base's critic,
        or, where it has none, the teacher.
      negative_prompt: what guidance leads away from.
      critic_updates: updates of the critic for each one of the generator.
      dtype: storage of the teacher's weights, and of those a LoRA is added to.
    """

    teacher: str = ""
    teacher_preset: str = ""
    critic: str = ""
    negative_prompt: str = ""
    critic_updates: int = 5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        at_least("scores", self, critic_updates=1)
        require(
            self.teacher_preset in ("", *PRESETS),
            f"scores.teacher_preset={self.teacher_preset!r} is unknown; choose one of {', '.join(PRESETS)}",
        )


@dataclasses.dataclass(frozen=True)
class DistillTraining(Training):
    """What the stages that distil by distribution matching share.

    `run.steps` counts updates of the critic; the generator's come with the first of every
    `scores.critic_updates` of them. `optimizer` is the generator's.
    """

    data: PromptsConfig
    critic_optimizer: OptimizerConfig = OptimizerConfig(  # noqa: RUF009  (frozen)
        learning_rate=4e-7, schedule="constant"
    )
    dmd: DMDConfig = DMDConfig()  # noqa: RUF009  (frozen)
    rollout: RolloutConfig = RolloutConfig()
    scores: ScoresConfig = ScoresConfig()
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rollout(self.model, self.rollout)
        require(
            not self.data.prompts or self.evaluation.metric not in READ_FROM_PIXELS,
            f"evaluation.metric={self.evaluation.metric!r} is read from videos of the toy world's captions; "
            'with data.prompts choose "loss"',
        )

    @property
    def teacher_transformer(self) -> TransformerConfig:
        """Shape of the teacher."""
        named = self.scores.teacher_preset
        return preset_of(named).transformer if named else self.model.transformer

    def is_generator_due(self, step: int) -> bool:
        """Whether the generator is updated in this step (the first is step 1)."""
        return (step - 1) % self.scores.critic_updates == 0

    @property
    def updates(self) -> Mapping[str, tuple[OptimizerConfig, int]]:
        return {
            "optimizer": (self.optimizer, -(-self.run.steps // self.scores.critic_updates)),
            "critic_optimizer": (self.critic_optimizer, self.run.steps),
        }


@dataclasses.dataclass(frozen=True)
class InitTraining(DistillTraining):
    """Stage `init`: self-forcing distillation of single clips, with window and sink."""


@dataclasses.dataclass(frozen=True)
class StreamingConfig:
    """How long tuning cuts its sequences into clips.

    Attributes:
      sequence_frames: latent frames of a sequence.
      new_frames: choices for the new frames of a clip after the first; the others overlap.
      switch_frames: choices for the frame at which the prompt changes; empty keeps one prompt.
      keep_sink: leave the sink's keys and values as they are at a switch.
    """

    sequence_frames: int = 240
    new_frames: tuple[int, ...] = (18,)
    switch_frames: tuple[int, ...] = (21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201)
    keep_sink: bool = False


@dataclasses.dataclass(frozen=True)
class LongTraining(DistillTraining):
    """Stage `long`: streaming long tuning, clip by clip of sequences that switch their prompt."""

    streaming: StreamingConfig = StreamingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switches(self.streaming, self.data)


def check_rollout(model: PipelineConfig, rollout: RolloutConfig) -> None:
    """Refuses clips that the model's window does not allow."""
    window, frames = model.window, rollout.clip_frames
    require(
        frames % window.block_frames == 0,
        f"rollout.clip_frames={frames} must be a multiple of model.window.block_frames={window.block_frames}",
    )
    require(
        window.rope == "absolute",
        "model.window.rope='relative' is for inference; train with 'absolute'",
    )


def check_switches(streaming: StreamingConfig, data: PromptsConfig) -> None:
    """Refuses switches outside of a sequence, or to nothing."""
    frames = streaming.switch_frames
    require(
        all(0 < f < streaming.sequence_frames for f in frames),
        f"streaming.switch_frames={frames} must lie within streaming.sequence_frames="
        f"{streaming.sequence_frames}",
    )
    require(
        not frames or not data.prompts or data.switch_prompts != "",
        "data.switch_prompts is empty: name the file of prompts to switch to, or leave "
        "streaming.switch_frames empty",
    )
