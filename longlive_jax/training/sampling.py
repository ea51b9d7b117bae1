"""Samplers of models under training: what evaluations look at, and what trajectories are solved with.

Models that are not distilled yet take Euler steps along the flow, of a whole clip at once (teacher) or block
by block over the cache (causal student), with guidance by the unprompted prediction. A student that
knows its few denoising steps only is rolled out as at inference.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import cache as cache_lib
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.diffusion.schedule import NUM_TIMESTEPS, few_step_table, shift_sigma
from longlive_jax.inference.rollout import Generator
from longlive_jax.models.transformer import TextContext
from longlive_jax.types import Array, Params, pytree


@pytree
class Prompts:
    """Prompt embeddings `[B, M, text_dim]`, and those of no prompt (None samples without guidance)."""

    text: Array
    empty: Array | None


@dataclasses.dataclass(frozen=True)
class Solver:
    """Euler steps along the flow.

    Attributes:
      steps: how many.
      shift: timestep shift of their spacing.
      guidance: scale of the guidance by the unprompted prediction; 1 is none.
    """

    steps: int
    shift: float
    guidance: float = 1.0

    @property
    def sigmas(self) -> np.ndarray:
        """float32 `[steps + 1]`, from 1 to 0."""
        return np.asarray(shift_sigma(np.linspace(1.0, 0.0, self.steps + 1), self.shift), np.float32)

    def prompts(self, text: Array, empty: Array) -> Prompts:
        """Prompts `[B, M, text_dim]` beside the empty one `[M, text_dim]`, where guidance needs it."""
        return Prompts(text, None if self.guidance == 1 else jnp.broadcast_to(empty, text.shape))


def bidirectional(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    *,
    shape: tuple[int, int, int, int],
    solver: Solver,
) -> Array:
    """Samples whole clips, all frames attending to each other.

    Args:
      generator: gives the transformer and the noise.
      params: its parameters.
      prompts: what to show.
      seeds: uint32 `[B]`.
      shape: (F, h, w, C).
      solver: steps and guidance.

    Returns:
      `[B, F, h, w, C]` float32.
    """
    velocity, noise = _whole_clips(generator, params, prompts, seeds, shape, solver)
    return _euler(velocity, noise, solver)[0]


def trajectories(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    *,
    shape: tuple[int, int, int, int],
    solver: Solver,
) -> Array:
    """The way to the clips of `bidirectional` (which has the arguments): its states at the few-step levels.

    Returns:
      `[B, F, K + 1, h, w, C]` float32: states at the K noise levels of `generator.sampler`, and the clips.
    """
    velocity, noise = _whole_clips(generator, params, prompts, seeds, shape, solver)
    clips, kept = _euler(velocity, noise, solver, keep=few_step_table(generator.sampler).sigmas)
    return jnp.moveaxis(jnp.concatenate([kept, clips[None]]), 0, 2)


def few_step(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    *,
    shape: tuple[int, int, int, int],
) -> Array:
    """Samples clips as inference does, in the few steps of `generator.sampler` and without guidance."""
    frames, height, width, _ = shape
    state = generator.init(params, prompts.text, seeds, latent_size=(height, width), total_frames=frames)
    return generator.rollout(params, state, frames // generator.window.block_frames)[1]


def causal(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    *,
    shape: tuple[int, int, int, int],
    solver: Solver,
) -> Array:
    """Samples clips block by block, as `Generator.rollout` does but with Euler steps; see `bidirectional`.

    With guidance the unprompted prediction has a cache of its own.
    """
    frames, height, width, _ = shape
    model, block = generator.transformer, generator.window.block_frames
    text = _contexts(generator, params, prompts)
    caches = tuple(
        cache_lib.init(
            model.config,
            generator.window,
            batch=seeds.shape[0],
            frame_len=model.config.frame_len(height, width),
            dtype=model.dtype,
            total_frames=frames,
        )
        for _ in text
    )

    def one_block(caches: tuple[cache_lib.KVCache, ...], first: Array) -> tuple[tuple, Array]:
        positions = first + jnp.arange(block, dtype=jnp.int32)
        caches = tuple(cache_lib.place_sink(cache, first + block) for cache in caches)

        def velocity(noisy: Array, timestep: Array, index: int) -> Array:
            context = cache_lib.context(caches[index])
            return generator.velocity(params, noisy, timestep, text[index], positions, context)[0]

        noise = generator.noise(seeds, positions, jnp.int32(noise_lib.INITIAL_STEP), shape[1:])
        latents, _ = _euler(_guided(velocity, prompts, solver.guidance), noise, solver)
        own = [
            generator.context_pass(params, t, latents, positions, cache_lib.context(cache))
            for t, cache in zip(text, caches, strict=True)
        ]
        return tuple(cache_lib.write(c, o, first) for c, o in zip(caches, own, strict=True)), latents

    _, latents = jax.lax.scan(one_block, caches, jnp.arange(0, frames, block, dtype=jnp.int32))
    latents = latents.swapaxes(0, 1)  # [B, blocks, n, h, w, C]
    return latents.reshape(seeds.shape[0], -1, *shape[1:])


def _whole_clips(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    shape: tuple[int, int, int, int],
    solver: Solver,
) -> tuple[Callable[[Array, Array], Array], Array]:
    """The velocity field of whole clips, and the noise they begin with."""
    positions = jnp.arange(shape[0], dtype=jnp.int32)
    text = _contexts(generator, params, prompts)

    def velocity(noisy: Array, timestep: Array, index: int) -> Array:
        return generator.velocity(params, noisy, timestep, text[index], positions, None)[0]

    noise = generator.noise(seeds, positions, jnp.int32(noise_lib.INITIAL_STEP), shape[1:])
    return _guided(velocity, prompts, solver.guidance), noise


def _contexts(generator: Generator, params: Params, prompts: Prompts) -> tuple[TextContext, ...]:
    texts = (prompts.text,) if prompts.empty is None else (prompts.text, prompts.empty)
    return tuple(generator.encode_text(params, text) for text in texts)


def _guided(
    velocity: Callable[[Array, Array, int], Array], prompts: Prompts, guidance: float
) -> Callable[[Array, Array], Array]:
    def guided(noisy: Array, timestep: Array) -> Array:
        prompted = velocity(noisy, timestep, 0)
        if prompts.empty is None:
            return prompted
        empty = velocity(noisy, timestep, 1)
        return empty + guidance * (prompted - empty)

    return guided


def _euler(
    velocity: Callable[[Array, Array], Array],
    noise: Array,
    solver: Solver,
    *,
    keep: np.ndarray | None = None,
) -> tuple[Array, Array]:
    """Follows the flow from noise to its end.

    Args:
      velocity: of (noisy, timestep).
      noise: `[B, ...]`, at sigma 1.
      solver: its steps.
      keep: float32 `[K]`, noise levels in (0, 1] at which the state is kept. An Euler step is a straight
        line, so a level inside of one has a state on the solver's own way.

    Returns:
      The end `[B, ...]`, and the states kept `[K, B, ...]`.
    """
    levels = jnp.asarray(() if keep is None else keep, jnp.float32)

    def one(carry: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (noisy, kept), (sigma, following) = carry, pair
        slope = velocity(noisy, sigma * NUM_TIMESTEPS)
        ahead = (levels - sigma).reshape(-1, *(1,) * noise.ndim)  # [K, 1, ...]
        is_passed = ((levels <= sigma) & (levels > following)).reshape(ahead.shape)
        kept = jnp.where(is_passed, noisy + ahead * slope, kept)
        return (noisy + (following - sigma) * slope, kept), None

    sigmas = jnp.asarray(solver.sigmas)
    start = (noise, jnp.zeros((levels.size, *noise.shape), noise.dtype))
    return jax.lax.scan(one, start, (sigmas[:-1], sigmas[1:]))[0]
