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
from longlive_jax.config import CacheDType, SamplerConfig, WindowConfig
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.diffusion import schedule
from longlive_jax.models import rope
from longlive_jax.models.transformer import TextContext, Transformer
from longlive_jax.types import Array, Params, pytree

FLUSH_FRAMES = 2
"""Latest frames that a flush keeps beside the sink."""

CUT_GAP = 40
"""Frames of distance a cut puts between what is kept and the next block: Infinity-RoPE puts a block that
would follow 5 kept frames at positions 45 to 47 of the window."""


@pytree
class RolloutState:
    """Everything the next block depends on, apart from the weights.

    Attributes:
      cache: keys and values of earlier frames.
      text: cross-attention keys and values of the current prompts.
      history: `[B, W, h, w, C]` float32, the latest latents, newest last; what a recache reads.
      seeds: uint32 `[B]`.
      frame: int32 scalar, position of the next frame to generate.
      gap: int32 `[B]`, how much further from the frames before it the next block sits: more than 0 right
        after a cut only. None until the first cut, so that a rollout without one is the plain program.
    """

    cache: KVCache
    text: TextContext
    history: Array
    seeds: Array
    frame: Array
    gap: Array | None = None


@dataclasses.dataclass(frozen=True)
class Generator:
    """How blocks are made: the model, what it attends to, and the few-step sampler.

    Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      transformer: the flax module (its parameters are passed to every call).
      window: window, sink, block and rope mode.
      sampler: denoising steps and schedule.
      noise: where noise comes from; the default depends on (seed, frame, step) alone.
      cache_dtype: whether the cache keeps keys and values as they are computed, or in 8 bits.
    """

    transformer: Transformer
    window: WindowConfig
    sampler: SamplerConfig
    noise: noise_lib.NoiseFn = noise_lib.frame_noise
    cache_dtype: CacheDType = "same"

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
            storage=self.cache_dtype,
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
        places = _places(state, positions)
        own = self.context_pass(params, state.text, latents, places, cache_lib.context(cache))
        if state.gap is not None:
            moved = rope.shift_frames(own.key, -state.gap, jitter=self.transformer.rope_jitter)
            own = dataclasses.replace(own, key=moved)
        history = jnp.concatenate([state.history, latents], axis=1)[:, -state.history.shape[1] :]
        return (
            dataclasses.replace(
                state,
                cache=cache_lib.write(cache, own, state.frame),
                history=history,
                frame=state.frame + block,
                gap=None if state.gap is None else jnp.zeros_like(state.gap),
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
        places = _places(state, positions)

        def one_pass(x: Array, step: tuple[Array, ...]) -> tuple[Array, None]:
            timestep, sigma, next_sigma, index = step
            # In here: the loop then carries the cache as it lies, and not in another shape, which XLA's CPU
            # compiler may copy it for.
            context = cache_lib.context(cache)
            velocity, _ = self.velocity(params, x, timestep, state.text, places, context)
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

    def flush(
        self, params: Params, state: RolloutState, text: Array, mask: Array, *, frames: int = FLUSH_FRAMES
    ) -> RolloutState:
        """New prompts and a cache that keeps only the sink and the latest `frames` frames; no pass.

        Source: Infinity-RoPE (arXiv 2511.20649). The arguments are those of `keep`.
        """
        state = self.keep(params, state, text, mask)
        return dataclasses.replace(state, cache=cache_lib.flush(state.cache, mask, frames=frames))

    def cut(
        self,
        params: Params,
        state: RolloutState,
        text: Array,
        mask: Array,
        *,
        frames: int = FLUSH_FRAMES,
        gap: int = CUT_GAP,
    ) -> RolloutState:
        """A `flush` after which the next block sits `gap` frames away from what is kept: a new scene.

        The block's passes see the kept frames at that distance. Its keys enter the cache without it, so
        that later blocks see one sequence again. Rotations compose, so nothing else has to be stored.

        Source: Infinity-RoPE (arXiv 2511.20649). The arguments are those of `flush`.
        """
        state = self.flush(params, state, text, mask, frames=frames)
        pending = jnp.zeros(mask.shape, jnp.int32) if state.gap is None else state.gap
        return dataclasses.replace(state, gap=jnp.where(mask, jnp.int32(gap), pending))

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

    def recache_extent(self, *, frame: int, start: int, ring_start: int, keep_sink: bool) -> tuple[int, bool]:
        """What a recache of one sample reads: the values of `frames` and `keep_sink` for `recache`.

        Where frames are missing between the sink and the ring (after a flush, or a change of the window),
        only those since then follow each other; the sink stays or is replaced by the oldest of them.

        Args:
          frame: the next frame.
          start: `cache.start` of the sample.
          ring_start: `cache.ring_start` of the sample.
          keep_sink: the setting.
        """
        sink = self.window.sink_frames
        if ring_start <= start + sink or not self.window.is_bounded:
            return self.recache_frames(frame - start), self.keeps_sink(frame - start, keep_sink)
        keeps_sink = keep_sink and sink > 0
        return self.recache_frames(frame - ring_start + (sink if keeps_sink else 0)), keeps_sink

    def resize(self, state: RolloutState) -> RolloutState:
        """Fits a state of another bounded window to this generator's; no pass of the model.

        Frames that the old window has forgotten do not come back: a larger one fills with the next blocks.
        """
        missing = self.window.window_frames - state.history.shape[1]
        history = jnp.pad(state.history, ((0, 0), (max(missing, 0), 0), (0, 0), (0, 0), (0, 0)))
        return dataclasses.replace(
            state,
            cache=cache_lib.resize(state.cache, self.window),
            history=history[:, history.shape[1] - self.window.window_frames :],
        )

    def recache_frames(self, generated: int) -> int:
        """Latents a recache reads when `generated` frames lie behind (since the last clear)."""
        return min(generated, self.window.window_frames) if self.window.is_bounded else generated

    def keeps_sink(self, generated: int, keep_sink: bool) -> bool:
        """Whether a recache after `generated` frames leaves the sink alone.

        Only where the window no longer reaches back to the sink; before that the release rewrites
        everything, sink included, whatever the setting.
        """
        return keep_sink and self.window.is_bounded and generated > self.window.window_frames


def _places(state: RolloutState, positions: Array) -> Array:
    """Where rotary embedding puts the next block, `[F]` or `[B, F]`; its noise stays that of its frames."""
    return positions if state.gap is None else positions + state.gap[:, None]


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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames="frames")
def flush(
    generator: Generator,
    params: Params,
    state: RolloutState,
    text: Array,
    mask: Array,
    *,
    frames: int = FLUSH_FRAMES,
) -> RolloutState:
    """Compiled `Generator.flush`; consumes `state`."""
    return generator.flush(params, state, text, mask, frames=frames)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames=("frames", "gap"))
def cut(
    generator: Generator,
    params: Params,
    state: RolloutState,
    text: Array,
    mask: Array,
    *,
    frames: int = FLUSH_FRAMES,
    gap: int = CUT_GAP,
) -> RolloutState:
    """Compiled `Generator.cut`; consumes `state`."""
    return generator.cut(params, state, text, mask, frames=frames, gap=gap)


@functools.partial(jax.jit, static_argnums=0)
def resize(generator: Generator, state: RolloutState) -> RolloutState:
    """Compiled `Generator.resize`; `state` stays as it is."""
    return generator.resize(state)


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
