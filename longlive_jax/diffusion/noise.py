"""Noise that depends on nothing but (seed, frame, step).

Every latent frame of every sample draws its own stream, so a sample's noise is bit-identical
whatever batch it is in, however many frames a block has and on however many devices it runs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.errors import require
from longlive_jax.types import Array

INITIAL_STEP = 0
"""Step number of the noise a block starts from; the re-noise before the k-th pass is step k."""

NoiseFn = Callable[[Array, Array, Array, tuple[int, int, int]], Array]
"""`(seeds [B], positions [F], step, (h, w, C)) -> [B, F, h, w, C]`."""


def frame_noise(seeds: Array, positions: Array, step: Array | int, shape: tuple[int, int, int]) -> Array:
    """Standard normal noise for some frames of some samples.

    Args:
      seeds: uint32 `[B]`, one per sample.
      positions: int32 `[F]` absolute frame positions, or `[B, F]`.
      step: int32 scalar; `INITIAL_STEP`, or the number of the pass the noise precedes.
      shape: (h, w, C) of one latent frame.

    Returns:
      float32 `[B, F, h, w, C]`.
    """
    positions = jnp.broadcast_to(positions, (seeds.shape[0], positions.shape[-1]))

    def one(seed: Array, position: Array) -> Array:
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, position), step)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seeds, positions)


def seed_array(seed: int | Sequence[int], batch: int) -> np.ndarray:
    """uint32 `[batch]` seeds: the given ones, or seed, seed + 1, ... from a single number.

    Raises:
      UserError: a seed does not fit 32 bits, or their number is not the batch size.
    """
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else [int(s) for s in seed]
    require(
        len(seeds) == batch, f"seed={seed} gives {len(seeds)} seeds for {batch} videos; give one or {batch}"
    )
    for value in seeds:
        require(0 <= value < 2**32, f"seed={value} must be in [0, 2**32)")
    return np.asarray(seeds, np.uint32)
