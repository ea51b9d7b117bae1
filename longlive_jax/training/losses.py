"""The losses: flow matching, distribution matching (DMD) and the critic's.

Everything is float32. The release uses float64 in a few places; here the cancellations that would
need it are written away instead.

Source: LongLive `model/dmd.py`, `utils/loss.py`, `model/streaming_training.py` (v1.0); DMD: arXiv
2311.18828, equations 7 and 8.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from longlive_jax.diffusion.schedule import NUM_TIMESTEPS, FlowSchedule, shift_sigma
from longlive_jax.errors import require
from longlive_jax.types import Array, PRNGKey, pytree

ScoreFn = Callable[[Array, Array], Array]
"""A bidirectional model under one prompt: `(noisy [B, F, h, w, C], timesteps [B, 1]) -> velocity`."""

CriticFlow = Literal["rescaled", "plain"]


@dataclasses.dataclass(frozen=True)
class DMDConfig:
    """Distribution matching between the generator's clips and the teacher's.

    Attributes:
      guidance: g of the teacher's `cond + g (cond - uncond)`; 0 asks for no guidance (the weight as it
        is usually counted is 1 + g).
      shift: timestep shift of the noise added to a clip and of the law timesteps are drawn from.
      score_shift: shift of the table in which teacher and critic look up the sigma that turns their
        velocity into x0. The release leaves it at 8 beside a shift of 5, so the sigmas differ a little.
      min_timestep: lowest timestep the teacher and critic are asked at.
      max_timestep: highest.
      opening_weight: weight of the block that opens a video, and of the first under a new prompt, in the
        generator's loss; that of all others is 1. They have no past to follow, and what goes wrong in them
        stays.
      critic_flow: "rescaled" compares the flow the release gets by way of x0, velocity times
        sigma(score_shift) / sigma(shift); "plain" compares the critic's velocity itself. The same where
        both shifts are equal.
    """

    guidance: float = 3.0
    shift: float = 5.0
    score_shift: float = 8.0
    min_timestep: float = 20.0
    max_timestep: float = 980.0
    opening_weight: float = 1.0
    critic_flow: CriticFlow = "rescaled"

    def __post_init__(self) -> None:
        require(self.shift > 0, f"dmd.shift={self.shift} must be positive")
        require(self.score_shift > 0, f"dmd.score_shift={self.score_shift} must be positive")
        require(self.opening_weight > 0, f"dmd.opening_weight={self.opening_weight} must be positive")
        require(
            0 <= self.min_timestep <= self.max_timestep <= NUM_TIMESTEPS,
            f"dmd.min_timestep={self.min_timestep} and max_timestep={self.max_timestep} must rise within "
            f"[0, {NUM_TIMESTEPS}]",
        )


@pytree
class DMDReport:
    """What is worth logging of one DMD loss.

    Attributes:
      gradient: `[B, F, h, w, C]`, the normalised difference of the scores, before any mask.
      normalizer: `[B]`, mean distance of a clip from the teacher's estimate of it.
    """

    gradient: Array
    normalizer: Array


def draw_timesteps(config: DMDConfig, key: PRNGKey, batch: int) -> Array:
    """One timestep per clip from the law of `timestep_law`, float32 `[batch]`."""
    return timestep_law(config, jax.random.randint(key, (batch,), 0, NUM_TIMESTEPS))


def timestep_law(config: DMDConfig, uniform: Array) -> Array:
    """Timesteps from uniform draws: shifted towards noise, then clamped.

    Args:
      config: shift and bounds.
      uniform: integers in [0, 1000), any shape.

    Returns:
      float32 timesteps in [min_timestep, max_timestep].
    """
    shifted = jnp.asarray(shift_sigma(uniform.astype(jnp.float32) / NUM_TIMESTEPS, config.shift))
    return jnp.clip(shifted * NUM_TIMESTEPS, config.min_timestep, config.max_timestep)


def flow_matching_loss(
    velocity: Array, x0: Array, noise: Array, *, mask: Array | None = None, weight: Array | None = None
) -> Array:
    """Mean squared distance of the predicted velocity from `noise - x0`.

    Args:
      velocity: `[B, F, h, w, C]`, predicted.
      x0: clean latents.
      noise: the noise that was added to them.
      mask: bool `[F]` or `[B, F]`, the frames that count.
      weight: float `[B]` or `[B, F]`, multiplies the squared error (`FlowSchedule.training_weight`).
    """
    error = jnp.square(velocity.astype(jnp.float32) - (noise - x0).astype(jnp.float32))
    if weight is not None:
        error = error * weight.reshape(weight.shape + (1,) * (error.ndim - weight.ndim))
    return _mean(error, mask)


def dmd_loss(
    config: DMDConfig,
    clip: Array,
    timesteps: Array,
    noise: Array,
    *,
    critic: ScoreFn,
    teacher: ScoreFn,
    teacher_uncond: ScoreFn,
    mask: Array | None = None,
    weight: Array | None = None,
) -> tuple[Array, DMDReport]:
    """Distribution matching loss of generated clips; its gradient moves them towards the teacher.

    The scores are asked without gradient. The loss is half the mean square of their normalised
    difference, and its derivative by the clip is that difference over the number of elements.

    Args:
      config: guidance and schedules.
      clip: `[B, F, h, w, C]` generated latents.
      timesteps: float32 `[B]`, one per clip; see `draw_timesteps`.
      noise: `[B, F, h, w, C]` standard normal.
      critic: score of the generator's distribution, under the prompt.
      teacher: score of the true distribution, under the prompt.
      teacher_uncond: the same under the negative prompt.
      mask: bool `[F]` or `[B, F]`, the frames that count. The normaliser is over all frames.
      weight: float `[F]` or `[B, F]`, how much they count; None for the same.

    Returns:
      float32 scalar, and the report.
    """
    fixed = jax.lax.stop_gradient(clip).astype(jnp.float32)
    at = timesteps[:, None]
    noisy = FlowSchedule(config.shift).add_noise(fixed, noise, at)
    table = FlowSchedule(config.score_shift)
    fake, cond, uncond = (
        table.to_x0(noisy, score(noisy, at).astype(jnp.float32), at)
        for score in (critic, teacher, teacher_uncond)
    )
    report = dmd_gradient(fixed, fake=fake, real=cond + config.guidance * (cond - uncond))
    report = jax.lax.stop_gradient(report)
    # clip - fixed is exactly zero, so this is mse(clip, fixed - gradient) without its rounding.
    residual = clip.astype(jnp.float32) - fixed + report.gradient
    return 0.5 * _mean(jnp.square(residual), mask, weight), report


def dmd_gradient(clip: Array, *, fake: Array, real: Array) -> DMDReport:
    """The DMD gradient from the two estimates of x0, all `[B, F, h, w, C]`.

    Where it is not a number (a clip that equals the teacher's estimate) it is zero.
    """
    normalizer = jnp.mean(jnp.abs(clip - real), axis=(1, 2, 3, 4))
    gradient = (fake - real) / normalizer[:, None, None, None, None]
    return DMDReport(jnp.where(jnp.isnan(gradient), 0.0, gradient), normalizer)


def critic_loss(
    config: DMDConfig,
    clip: Array,
    timesteps: Array,
    noise: Array,
    *,
    critic: ScoreFn,
    mask: Array | None = None,
) -> Array:
    """Flow-matching loss of the critic on generated clips; arguments as in `dmd_loss`.

    Returns:
      float32 scalar.
    """
    clip = jax.lax.stop_gradient(clip).astype(jnp.float32)
    at = timesteps[:, None]
    schedule = FlowSchedule(config.shift)
    flow = critic(schedule.add_noise(clip, noise, at), at).astype(jnp.float32)
    if config.critic_flow == "rescaled":
        ratio = FlowSchedule(config.score_shift).sigma(at) / schedule.sigma(at)  # [B, 1]
        flow = flow * ratio[..., None, None, None]
    return flow_matching_loss(flow, clip, noise, mask=mask)


def _mean(error: Array, mask: Array | None, weight: Array | None = None) -> Array:
    """Mean over `[B, F, h, w, C]`, of the frames in `mask` alone, some with more weight than others."""
    if mask is None and weight is None:
        return jnp.mean(error)
    per_frame = jnp.mean(error, axis=(2, 3, 4))  # [B, F]
    chosen = jnp.broadcast_to(True if mask is None else mask, per_frame.shape)
    share = jnp.where(chosen, 1.0 if weight is None else weight, 0.0)
    return jnp.sum(jnp.where(chosen, per_frame, 0.0) * share) / jnp.sum(share)
