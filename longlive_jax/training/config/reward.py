"""Configs of the stages of reward tuning: `reader`, which trains the reward, and `reward`."""

import dataclasses
from typing import ClassVar

from longlive_jax.errors import require
from longlive_jax.toy.world import FIELDS
from longlive_jax.training.config.distill import (
    LoRAConfig,
    RolloutConfig,
    StreamingConfig,
    check_rollout,
    check_switches,
)
from longlive_jax.training.config.shared import ClipsConfig, PromptsConfig, Training, at_least


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """The network that reads attributes from blocks of latents.

    Attributes:
      dim: its channels.
      layers: its residual layers.
      misshapen_share: share of the clips whose sprite is none of the world's shapes, a class of its own
        (`toy.misshapen`). What it does not know as misshapen a generator can pass off as a shape.
      clean_share: share of the blocks that are read without noise.
      max_sigma: largest noise level of the others, drawn evenly.
      cache_folder: where encoded clips are kept; "" puts them beside the run's folder.
    """

    dim: int = 64
    layers: int = 3
    misshapen_share: float = 0.5
    clean_share: float = 0.3
    max_sigma: float = 0.8
    cache_folder: str = ""

    def __post_init__(self) -> None:
        at_least("reader", self, dim=1, layers=0)
        for name in ("misshapen_share", "clean_share", "max_sigma"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"reader.{name}={value} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class ReaderTraining(Training):
    """Stage `reader`: what the toy world's attributes look like in blocks of latents, noisy or not."""

    data: ClipsConfig
    reader: ReaderConfig = ReaderConfig()

    evaluated: ClassVar[tuple[str, ...]] = (*FIELDS, "all", "misshapen")

    def __post_init__(self) -> None:
        super().__post_init__()
        block = self.model.window.block_frames
        require(
            self.data.frames % block == 0,
            f"data.frames={self.data.frames} must be a multiple of model.window.block_frames={block}",
        )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a generator is rewarded for, and how far it may go for it.

    Attributes:
      reader: checkpoint directory with the reader; "" is `base`.
      max_sigma: largest noise level, drawn evenly, under which blocks are read. Under noise a reader sees
        what is there and not the pattern that would fool it.
      anchor_weight: weight of the mean square distance of the latents from what the base makes of the same
        noise and the same past, against the reader's cross-entropy (summed over attributes).
    """

    reader: str = ""
    max_sigma: float = 0.7
    anchor_weight: float = 15.0

    def __post_init__(self) -> None:
        at_least("reward", self, anchor_weight=0)
        require(0 <= self.max_sigma <= 1, f"reward.max_sigma={self.max_sigma} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class RewardTraining(Training):
    """Stage `reward`: the student on its own rollouts, towards blocks in which the prompt can be read.

    Needs no teacher and no critic. `lora.is_critic_adapted` has no meaning here.
    """

    data: PromptsConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()  # noqa: RUF009  (frozen)
    streaming: StreamingConfig = StreamingConfig()  # noqa: RUF009  (frozen)
    lora: LoRAConfig = LoRAConfig()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rollout(self.model, self.rollout)
        check_switches(self.streaming, self.data)
        require(
            not self.data.prompts,
            f"data.prompts={self.data.prompts} cannot be read from videos: the reader knows the toy world's "
            "captions only",
        )
