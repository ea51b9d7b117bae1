"""Configs of the stages that train what surrounds the transformer: `vae` and `text`."""

import dataclasses
from typing import ClassVar, Literal

from longlive_jax.errors import require
from longlive_jax.training.config.shared import READ_FROM_PIXELS, ClipsConfig, Training, at_least


@dataclasses.dataclass(frozen=True)
class VAELoss:
    """What the autoencoder is asked for.

    Attributes:
      sprite_weight: weight of a pixel the sprite covers or touches, against 1 for the background.
      latent_noise: deviation of the noise that is added to (not yet normalised) latents before decoding.
      latent_weight: weight of the latents' mean square. With the noise this is the KL divergence of a
        posterior of fixed width from a standard normal.
      anchor_weight: weight of the latents' mean square distance from a linear code of their cells
        (`training.anchor`): latents that move as pixels do are easier to model. 0 leaves them free.
      statistics_clips: clips from which the latents' mean and deviation are measured.
      trained: "decoder" leaves the encoder of the base as it is, and with it the latents: models of them
        stay good.
    """

    sprite_weight: float = 4.0
    latent_noise: float = 0.1
    latent_weight: float = 1e-3
    anchor_weight: float = 0.0
    statistics_clips: int = 256
    trained: Literal["all", "decoder"] = "all"

    def __post_init__(self) -> None:
        at_least(
            "vae",
            self,
            sprite_weight=0,
            latent_noise=0,
            latent_weight=0,
            anchor_weight=0,
            statistics_clips=1,
        )


@dataclasses.dataclass(frozen=True)
class VAETraining(Training):
    """Stage `vae`: the causal video autoencoder, on rendered clips."""

    data: ClipsConfig
    vae: VAELoss = VAELoss()

    evaluated: ClassVar[tuple[str, ...]] = (*READ_FROM_PIXELS, "psnr")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.vae.trained == "all" or self.base != "",
            f"vae.trained={self.vae.trained} needs the encoder of a base; set base",
        )


@dataclasses.dataclass(frozen=True)
class TextTraining(Training):
    """Stage `text`: the text encoder, by naming the attributes a caption describes."""

    data: ClipsConfig

    evaluated: ClassVar[tuple[str, ...]] = ("accuracy",)
