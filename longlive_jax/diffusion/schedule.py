"""Flow matching: the shifted noise schedule and the algebra between x0, noise and velocity.

`x_t = (1 - sigma) x0 + sigma noise`; the network predicts the velocity `noise - x0`; so
`x0 = x_t - sigma velocity`. Timesteps are `1000 sigma`. Sigmas of arbitrary timesteps are those of
the nearest entry of a table of 1000 (so timestep 0 has sigma 0.00498 at shift 5, as in the release).

Source: LongLive `utils/scheduler.py` (FlowMatchScheduler), `utils/wan_wrapper.py`.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from longlive_jax.config import SamplerConfig
from longlive_jax.types import Array, ArrayLike

NUM_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """The table of one timestep shift.

    Attributes:
      shift: s in `s u / (1 + (s - 1) u)`; 1 leaves the uniform schedule, larger spends more steps on noise.
    """

    shift: float = 5.0

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """float32 `[1000]`, falling from 1."""
        uniform = np.linspace(1.0, 0.0, NUM_TIMESTEPS + 1)[:-1]
        return np.asarray(shift_sigma(uniform, self.shift), np.float32)

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """float32 `[1000]`, `1000 sigma`."""
        return self.sigmas * np.float32(NUM_TIMESTEPS)

    @functools.cached_property
    def training_weights(self) -> np.ndarray:
        """float32 `[1000]`: bell-shaped over the timestep, smallest entry 0, summing to 1000."""
        timesteps = self.timesteps.astype(np.float64)
        bell = np.exp(-2 * ((timesteps - NUM_TIMESTEPS / 2) / NUM_TIMESTEPS) ** 2)
        bell -= bell.min()
        return (bell * (NUM_TIMESTEPS / bell.sum())).astype(np.float32)

    def nearest_index(self, timesteps: Array) -> Array:
        """int32 `[...]` table index nearest to each of `[...]` timesteps."""
        distance = jnp.abs(self.timesteps - jnp.asarray(timesteps, jnp.float32)[..., None])
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def sigma(self, timesteps: Array) -> Array:
        """float32 `[...]` sigma of the table entry nearest to each timestep."""
        return jnp.asarray(self.sigmas)[self.nearest_index(timesteps)]

    def training_weight(self, timesteps: Array) -> Array:
        """float32 `[...]` loss weight of each timestep."""
        return jnp.asarray(self.training_weights)[self.nearest_index(timesteps)]

    def add_noise(self, x0: Array, noise: Array, timesteps: Array) -> Array:
        """x_t; `timesteps` has the leading axes of `x0`, e.g. `[B, F]` for `[B, F, h, w, C]`."""
        sigma = _over(self.sigma(timesteps), x0)
        return (1 - sigma) * x0 + sigma * noise

    def to_x0(self, noisy: Array, velocity: Array, timesteps: Array) -> Array:
        """x0 from x_t and the predicted velocity."""
        return noisy - _over(self.sigma(timesteps), noisy) * velocity

    def to_velocity(self, noisy: Array, x0: Array, timesteps: Array) -> Array:
        """The inverse of `to_x0`."""
        return (noisy - x0) / _over(self.sigma(timesteps), noisy)

    def euler_step(self, noisy: Array, velocity: Array, timesteps: Array) -> Array:
        """One step down the table, from each timestep's entry to the next (sigma 0 after the last).

        The release steps the whole batch to sigma 0 as soon as one sample is at the last entry; here
        every sample takes its own step.
        """
        index = self.nearest_index(timesteps)
        following = jnp.append(jnp.asarray(self.sigmas), 0.0)[index + 1]
        return noisy + _over(following - jnp.asarray(self.sigmas)[index], noisy) * velocity

    def warp(self, steps: tuple[int, ...]) -> np.ndarray:
        """float32 timesteps of few-step indices: entry k is the table's `1000 - k`, and 0 for k = 0."""
        table = np.append(self.timesteps, np.float32(0))
        return table[NUM_TIMESTEPS - np.asarray(steps)]


@dataclasses.dataclass(frozen=True)
class FewStepTable:
    """The timesteps and sigmas of a few-step sampler, as host constants.

    Attributes:
      timesteps: float32 `[K]`, falling.
      sigmas: float32 `[K]`, of the same entries.
      next_sigmas: float32 `[K]`, sigma the x0 estimate is re-noised to after each step; 0 after the last.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    next_sigmas: np.ndarray


def few_step_table(config: SamplerConfig) -> FewStepTable:
    """Resolves the sampler's step list against its schedule."""
    schedule = FlowSchedule(config.shift)
    steps = schedule.warp(config.steps) if config.warp_steps else np.asarray(config.steps, np.float32)
    nearest = np.argmin(np.abs(schedule.timesteps[None] - steps[:, None]), axis=1)
    sigmas = schedule.sigmas[nearest]
    return FewStepTable(steps, sigmas, np.append(sigmas[1:], np.float32(0)))


def shift_sigma(sigma: ArrayLike, shift: float) -> ArrayLike:
    """Moves sigmas in [0, 1] towards noise: `s sigma / (1 + (s - 1) sigma)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _over(per_leading: Array, like: Array) -> Array:
    """Appends axes of size 1 until `per_leading` broadcasts against `like`."""
    return per_leading.reshape(per_leading.shape + (1,) * (like.ndim - per_leading.ndim))
