"""Many-step samplers of models that are not distilled yet: what the evaluations of training look at.

Euler steps along the flow, of a whole clip at once (teacher) or block by block over the cache
(causal student), with guidance by the unprompted prediction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import cache as cache_lib
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.diffusion.schedule import NUM_TIMESTEPS, shift_sigma
from longlive_jax.inference.rollout import Generator
from longlive_jax.models.transformer import TextContext
from longlive_jax.types import Array, Params, pytree


@pytree
class Prompts:
    """Prompt embeddings `[B, M, text_dim]`, and those of no prompt (None samples without guidance)."""

    text: Array
    empty: Array | None


def bidirectional(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    *,
    shape: tuple[int, int, int, int],
    steps: int,
    shift: float,
    guidance: float,
) -> Array:
    """Samples whole clips, all frames attending to each other.

    Args:
      generator: gives the transformer and the noise.
      params: its parameters.
      prompts: what to show.
      seeds: uint32 `[B]`.
      shape: (F, h, w, C).
      steps: Euler steps.
      shift: timestep shift of their spacing.
      guidance: 1 is none.

    Returns:
      `[B, F, h, w, C]` float32.
    """
    positions = jnp.arange(shape[0], dtype=jnp.int32)
    text = _contexts(generator, params, prompts)

    def velocity(noisy: Array, timestep: Array, index: int) -> Array:
        return generator.velocity(params, noisy, timestep, text[index], positions, None)[0]

    noise = generator.noise(seeds, positions, jnp.int32(noise_lib.INITIAL_STEP), shape[1:])
    return _euler(_guided(velocity, prompts, guidance), noise, steps=steps, shift=shift)


def causal(
    generator: Generator,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    *,
    shape: tuple[int, int, int, int],
    steps: int,
    shift: float,
    guidance: float,
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
        latents = _euler(_guided(velocity, prompts, guidance), noise, steps=steps, shift=shift)
        own = [
            generator.context_pass(params, t, latents, positions, cache_lib.context(cache))
            for t, cache in zip(text, caches, strict=True)
        ]
        return tuple(cache_lib.write(c, o, first) for c, o in zip(caches, own, strict=True)), latents

    _, latents = jax.lax.scan(one_block, caches, jnp.arange(0, frames, block, dtype=jnp.int32))
    latents = latents.swapaxes(0, 1)  # [B, blocks, n, h, w, C]
    return latents.reshape(seeds.shape[0], -1, *shape[1:])


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


def _euler(velocity: Callable[[Array, Array], Array], noise: Array, *, steps: int, shift: float) -> Array:
    sigmas = np.asarray(shift_sigma(np.linspace(1.0, 0.0, steps + 1), shift), np.float32)

    def one(noisy: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        sigma, following = pair
        return noisy + (following - sigma) * velocity(noisy, sigma * NUM_TIMESTEPS), None

    return jax.lax.scan(one, noise, (jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:])))[0]
