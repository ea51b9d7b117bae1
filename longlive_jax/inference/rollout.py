"""The block-autoregressive rollout: one step function for the scan, the stream and the trainer.

`Generator` is a frozen, hashable description (model, window, sampler) and everything that changes is
in `RolloutState`, a pytree. A step takes the state and returns the next state and one finished block
of latents, so a whole video is a `lax.scan` over steps, a stream is a Python loop over the same
steps, and a state can be saved, copied or branched like any other pytree.

Source: LongLive `pipeline/causal_inference.py`, `pipeline/interactive_causal_inference.py` (v1.0).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import cache as cache_lib
from longlive_jax.cache import BlockKV, KVCache
from longlive_jax.config import SamplerConfig, WindowConfig
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.diffusion import schedule
from longlive_jax.models.transformer import TextContext, Transformer
from longlive_jax.types import Array, Params, pytree


@pytree
class RolloutState:
    """Everything the next block depends on, apart from the weights.

    Attributes:
      cache: keys and values of earlier frames.
      text: cross-attention keys and values of the current prompts.
      history: `[B, W, h, w, C]` float32, the latest latents, newest last; what a recache reads.
      seeds: uint32 `[B]`.
      frame: int32 scalar, position of the next frame to generate.
    """

    cache: KVCache
    text: TextContext
    history: Array
    seeds: Array
    frame: Array


@dataclasses.dataclass(frozen=True)
class Generator:
    """How blocks are made: the model, what it attends to, and the few-step sampler.

    Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      transformer: the flax module (its parameters are passed to every call).
      window: window, sink, block and rope mode.
      sampler: denoising steps and schedule.
      noise: where noise comes from; the default depends on (seed, frame, step) alone.
    """

    transformer: Transformer
    window: WindowConfig
    sampler: SamplerConfig
    noise: noise_lib.NoiseFn = noise_lib.frame_noise

    def init(
        self,
        params: Params,
        text: Array,
        seeds: Array,
        *,
        latent_size: tuple[int, int],
        total_frames: int | None = None,
    ) -> RolloutState:
        """The state before the first block.

        Args:
          params: the transformer's parameters.
          text: `[B, M, text_dim]` prompt embeddings.
          seeds: uint32 `[B]`.
          latent_size: (h, w) of the latents.
          total_frames: latent frames of the whole video; only an unbounded window needs it.
        """
        config = self.transformer.config
        batch = text.shape[0]
        kept = self.window.window_frames if self.window.is_bounded else total_frames
        cache = cache_lib.init(
            config,
            self.window,
            batch=batch,
            frame_len=config.frame_len(*latent_size),
            dtype=self.transformer.dtype,
            total_frames=total_frames,
        )
        return RolloutState(
            cache=cache,
            text=self.encode_text(params, text),
            history=jnp.zeros((batch, kept or 0, *latent_size, config.latent_channels), jnp.float32),
            seeds=jnp.asarray(seeds, jnp.uint32),
            frame=jnp.zeros((), jnp.int32),
        )

    def encode_text(self, params: Params, text: Array) -> TextContext:
        """Cross-attention keys and values of `[B, M, text_dim]` prompt embeddings."""
        result: Any = self.transformer.apply({"params": params}, text, method="text_context")
        return result

    def step(self, params: Params, state: RolloutState) -> tuple[RolloutState, Array]:
        """Generates one block: the denoising passes, then the clean pass that enters it in the cache.

        Returns:
          The next state and the block's latents, float32 `[B, block_frames, h, w, C]`.
        """
        block = self.window.block_frames
        positions = state.frame + jnp.arange(block, dtype=jnp.int32)
        cache = cache_lib.place_sink(state.cache, state.frame + block)
        start = self.noise(
            state.seeds, positions, jnp.int32(noise_lib.INITIAL_STEP), _frame_shape(state.history)
        )
        latents = self.denoise(params, state, cache, start, positions)
        own = self.context_pass(params, state.text, latents, positions, cache_lib.context(cache))
        history = jnp.concatenate([state.history, latents], axis=1)[:, -state.history.shape[1] :]
        return (
            dataclasses.replace(
                state,
                cache=cache_lib.write(cache, own, state.frame),
                history=history,
                frame=state.frame + block,
            ),
            latents,
        )

    def denoise(
        self, params: Params, state: RolloutState, cache: KVCache, noisy: Array, positions: Array
    ) -> Array:
        """Runs the few-step sampler on one block; the cache is only read.

        After each pass but the last, the x0 estimate is re-noised with fresh noise to the next
        timestep. The timesteps are table entries, so their sigmas are exact.

        Args:
          params: the transformer's parameters.
          state: gives the prompts and seeds.
          cache: the cache, its sink in place.
          noisy: `[B, F, h, w, C]` noise to start from.
          positions: int32 `[F]`.

        Returns:
          x0, float32 `[B, F, h, w, C]`.
        """
        steps = schedule.few_step_table(self.sampler)
        context = cache_lib.context(cache)

        def one_pass(x: Array, step: tuple[Array, ...]) -> tuple[Array, None]:
            timestep, sigma, next_sigma, index = step
            velocity, _ = self.velocity(params, x, timestep, state.text, positions, context)
            x0 = x - sigma * velocity
            fresh = self.noise(state.seeds, positions, index + 1, _frame_shape(x))
            return (1 - next_sigma) * x0 + next_sigma * fresh, None

        count = jnp.arange(len(steps.timesteps), dtype=jnp.int32)
        # Unrolling buys nothing: one pass of the layers dwarfs the loop around it.
        columns = tuple(jnp.asarray(c) for c in (steps.timesteps, steps.sigmas, steps.next_sigmas, count))
        return jax.lax.scan(one_pass, noisy, columns)[0]

    def context_pass(
        self,
        params: Params,
        text: TextContext,
        latents: Array,
        positions: Array,
        context: cache_lib.CachedContext | None,
    ) -> BlockKV:
        """Keys and values of finished latents at timestep `context_noise` (no noise is added)."""
        timestep = jnp.float32(self.sampler.context_noise)
        return self.velocity(params, latents, timestep, text, positions, context)[1]

    def velocity(
        self,
        params: Params,
        latents: Array,
        timestep: Array,
        text: TextContext,
        positions: Array,
        context: cache_lib.CachedContext | None,
    ) -> tuple[Array, BlockKV]:
        """One pass of the transformer at a scalar timestep."""
        timesteps = jnp.broadcast_to(timestep, (latents.shape[0], 1)).astype(jnp.float32)
        result: Any = self.transformer.apply(
            {"params": params}, latents, timesteps, text, positions=positions, context=context
        )
        return result

    def rollout(self, params: Params, state: RolloutState, blocks: int) -> tuple[RolloutState, Array]:
        """`blocks` steps as one `lax.scan`.

        Returns:
          The state after them and the latents `[B, blocks * block_frames, h, w, C]`.
        """

        def body(carry: RolloutState, _: None) -> tuple[RolloutState, Array]:
            return self.step(params, carry)

        state, latents = jax.lax.scan(body, state, None, length=blocks)  # [blocks, B, n, h, w, C]
        latents = latents.swapaxes(0, 1)
        return state, latents.reshape(latents.shape[0], -1, *latents.shape[3:])

    # --- prompt switches ------------------------------------------------------------------------

    def keep(self, params: Params, state: RolloutState, text: Array, mask: Array) -> RolloutState:
        """New prompts for the samples in `mask`; the cache stays as it is.

        Args:
          params: the transformer's parameters.
          state: the state between two blocks.
          text: `[B, M, text_dim]` new prompt embeddings (any values where `mask` is False).
          mask: bool `[B]`, which samples switch.
        """
        new = self.encode_text(params, text)
        chosen = mask[None, :, None, None, None]
        return dataclasses.replace(
            state, text=jax.tree.map(lambda a, b: jnp.where(chosen, a, b), new, state.text)
        )

    def clear(self, params: Params, state: RolloutState, text: Array, mask: Array) -> RolloutState:
        """New prompts and an empty cache: the next block becomes the sink, positions go on."""
        state = self.keep(params, state, text, mask)
        emptied = cache_lib.restart(state.cache, state.frame)
        return dataclasses.replace(state, cache=cache_lib.select(mask, emptied, state.cache))

    def recache(
        self,
        params: Params,
        state: RolloutState,
        text: Array,
        mask: Array,
        *,
        frames: int,
        keep_sink: bool,
    ) -> RolloutState:
        """New prompts, and a cache rebuilt from the generated latents under them.

        The latest `frames` latents run through the model once, with dense attention among them, at
        timestep `context_noise` and at their absolute positions. With `keep_sink` the sink's keys and
        values stay, the recached frames attend to them as well, and the frames that would have fallen
        into the sink's slots are left out: as their keys are dropped in every layer, nothing else
        depends on them (the release computes them all the same).

        Args:
          params: the transformer's parameters.
          state: the state between two blocks.
          text: `[B, M, text_dim]` new prompt embeddings.
          mask: bool `[B]`, which samples switch. All of them must have `frames` frames to recache.
          frames: `recache_frames` of those samples.
          keep_sink: whether the sink stays. Only sensible once the window is full; see `keeps_sink`.
        """
        state = self.keep(params, state, text, mask)
        if frames == 0:
            return state
        if keep_sink:
            cache = cache_lib.place_sink(state.cache, state.frame)
            context = cache_lib.sink_context(cache)
            frames -= cache.sink_slots
        else:
            cache = cache_lib.restart(state.cache, state.frame - frames)
            context = None
        first = state.frame - frames
        positions = first + jnp.arange(frames, dtype=jnp.int32)
        latents = state.history[:, state.history.shape[1] - frames :]
        own = self.context_pass(params, state.text, latents, positions, context)
        rebuilt = cache_lib.write(cache, own, first)
        return dataclasses.replace(state, cache=cache_lib.select(mask, rebuilt, state.cache))

    def recache_frames(self, generated: int) -> int:
        """Latents a recache reads when `generated` frames lie behind (since the last clear)."""
        return min(generated, self.window.window_frames) if self.window.is_bounded else generated

    def keeps_sink(self, generated: int, keep_sink: bool) -> bool:
        """Whether a recache after `generated` frames leaves the sink alone.

        Only where the window no longer reaches back to the sink; before that the release rewrites
        everything, sink included, whatever the setting.
        """
        return keep_sink and self.window.is_bounded and generated > self.window.window_frames


def _frame_shape(latents: Array) -> tuple[int, int, int]:
    """(h, w, C) of `[B, F, h, w, C]`."""
    _, _, height, width, channels = latents.shape
    return height, width, channels


# --- compiled entry points ------------------------------------------------------------------------
# States are donated, so the cache is updated in place and the state passed in is gone afterwards.
# Equal generators share compilations; a `switch` compiles once per (policy, frames, keep_sink).


@functools.partial(jax.jit, static_argnums=0, static_argnames=("latent_size", "total_frames"))
def init(
    generator: Generator,
    params: Params,
    text: Array,
    seeds: Array,
    *,
    latent_size: tuple[int, int],
    total_frames: int | None = None,
) -> RolloutState:
    """Compiled `Generator.init`."""
    return generator.init(params, text, seeds, latent_size=latent_size, total_frames=total_frames)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(generator: Generator, params: Params, state: RolloutState) -> tuple[RolloutState, Array]:
    """Compiled `Generator.step`; consumes `state`."""
    return generator.step(params, state)


@functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
def rollout(
    generator: Generator, params: Params, state: RolloutState, blocks: int
) -> tuple[RolloutState, Array]:
    """Compiled `Generator.rollout`; consumes `state`."""
    return generator.rollout(params, state, blocks)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def keep(generator: Generator, params: Params, state: RolloutState, text: Array, mask: Array) -> RolloutState:
    """Compiled `Generator.keep`; consumes `state`."""
    return generator.keep(params, state, text, mask)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def clear(
    generator: Generator, params: Params, state: RolloutState, text: Array, mask: Array
) -> RolloutState:
    """Compiled `Generator.clear`; consumes `state`."""
    return generator.clear(params, state, text, mask)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames=("frames", "keep_sink"))
def recache(
    generator: Generator,
    params: Params,
    state: RolloutState,
    text: Array,
    mask: Array,
    *,
    frames: int,
    keep_sink: bool,
) -> RolloutState:
    """Compiled `Generator.recache`; consumes `state`."""
    return generator.recache(params, state, text, mask, frames=frames, keep_sink=keep_sink)
