"""The self-forcing rollout: clips from the generator's own past, with their gradient in one pass.

`SelfForcing.roll_out` generates a clip without gradient, block by block over the cache, as inference
does: each block is denoised up to its exit step, the x0 found there is its result, and a pass over
that result, slightly re-noised, enters it in the cache. What the gradient needs is kept: the noisy
input of every exit step and the keys and values that the cache held.

`SelfForcing.latents` then runs all exit steps again as a single pass (`ClipContext`): every block
attends to the kept keys and values of its sink and window and to itself. That gives the same latents
with all their gradients. No gradient goes through the cache in time, so nothing is lost; the
straight-through mode, in which later blocks do reach the exit steps of earlier ones, is a matter of
that pass too, because it only ever links keys and values of the same layer.

Compilation: exit steps, positions and the switch frame are traced. Static are the number of new
frames, and whether the clip opens a sequence (empty cache) or goes on with one (full cache, so that
the attended frames are at fixed places of the timeline). A training stage compiles two programs,
one where it only makes single clips, however long its sequences are.

Source: LongLive `pipeline/self_forcing_training.py`, `pipeline/streaming_switch_training.py` (v1.0).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import cache as cache_lib
from longlive_jax.cache import BlockKV, KVCache
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.diffusion import schedule
from longlive_jax.diffusion.schedule import FlowSchedule
from longlive_jax.errors import require
from longlive_jax.inference.rollout import Generator
from longlive_jax.models.transformer import TextContext
from longlive_jax.ops.windowed_attention import ClipContext
from longlive_jax.training.config import CacheGradient, TextGradient
from longlive_jax.training.recache import rebuild_after_switch
from longlive_jax.types import Array, Params, PRNGKey, pytree


@pytree
class Switch:
    """A prompt that replaces the first one in the course of a sequence.

    Attributes:
      text: `[B, M, text_dim]` embeddings of the new prompts.
      frame: int32 scalar; the first block at or after this frame is the first with the new prompt.
    """

    text: Array
    frame: Array


@pytree
class Sequence:
    """A video in the making: everything its next clip depends on, apart from the weights.

    Carried from iteration to iteration of streaming long tuning, and part of its checkpoints.

    Attributes:
      cache: keys and values of earlier frames. They stem from the weights of earlier iterations.
      history: `[B, R, h, w, C]` float32, the latest latents, newest last: what a recache reads and what
        the next clip overlaps with.
      seeds: uint32 `[B]`.
      frame: int32 scalar, position of the next frame.
      text: `[B, M, text_dim]` prompt embeddings.
      switch: the prompt switch of the sequence, past or to come, or None.
    """

    cache: KVCache
    history: Array
    seeds: Array
    frame: Array
    text: Array
    switch: Switch | None


@pytree
class Rollout:
    """F new frames of a sequence, and what their gradient needs.

    Attributes:
      latents: `[B, F, h, w, C]` float32, the new frames (without gradient).
      before: `[B, R, h, w, C]`, the frames before them (`Sequence.history`).
      first: int32 scalar, position of the first new frame.
      text: `[B, M, text_dim]`, the prompt the whole clip is judged by: that of its last block.
      graded: bool `[F]`; False before a switch within the clip.
      opens: bool `[F]`; the block that opens the sequence, or is the first with a new prompt.
      exit_inputs: `[B, F, h, w, C]`, noisy input of every block's exit step.
      exit_steps: int32 `[F]`.
      kept: `[L, B, A + F, P, N, H]` keys and values as the cache held them, A frames from before the
        clip in front; None if they were not asked for.
    """

    latents: Array
    before: Array
    first: Array
    text: Array
    graded: Array
    opens: Array
    exit_inputs: Array
    exit_steps: Array
    kept: BlockKV | None


@dataclasses.dataclass(frozen=True)
class SelfForcing:
    """How clips for training are made. Hashable: a static argument of `jax.jit`.

    Attributes:
      generator: model, window, sampler and noise, as at inference.
      cache_gradient: whether a block's loss reaches the exit steps of the blocks it attends to.
        "straight_through": the keys and values used are those of the clean pass, the gradient goes to
        those of the exit step. "opening": so in the clip that opens a sequence, "none" in later ones.
        That is what the release does, by way of buffers it overwrites in place: from the moment they are
        full (33 frames) it shifts their contents without gradient, which cuts the links.
      text_gradient: "full", or "none": the text MLP and the keys and values of cross-attention get no
        gradient, as in the release without gradient checkpointing.
      renoise_context: whether the pass that fills the cache sees its latents with noise of timestep
        `sampler.context_noise` added (sigma 0.00498 at 0), as in the release's training; its inference
        adds none.
      keep_sink: at a prompt switch, leave the sink's keys and values as they are.
    """

    generator: Generator
    cache_gradient: CacheGradient = "straight_through"
    text_gradient: TextGradient = "full"
    renoise_context: bool = True
    keep_sink: bool = False

    def __post_init__(self) -> None:
        require(
            self.generator.window.rope == "absolute",
            "window.rope='relative' is for inference; train with 'absolute'",
        )

    def begin(
        self,
        text: Array,
        seeds: Array,
        *,
        latent_size: tuple[int, int],
        history_frames: int,
        switch: Switch | None = None,
    ) -> Sequence:
        """A sequence before its first frame.

        Args:
          text: `[B, M, text_dim]` prompt embeddings.
          seeds: uint32 `[B]`; a sequence needs new ones for new noise.
          latent_size: (h, w).
          history_frames: R; also the length of a sequence whose window is unbounded.
          switch: the prompt switch to come.
        """
        window, model = self.generator.window, self.generator.transformer
        require(
            switch is None or (window.is_bounded and history_frames >= window.window_frames),
            f"history_frames={history_frames} must be at least window.window_frames="
            f"{window.window_frames}, which must be bounded, for a prompt switch",
        )
        batch = text.shape[0]
        cache = cache_lib.init(
            model.config,
            window,
            batch=batch,
            frame_len=model.config.frame_len(*latent_size),
            dtype=model.dtype,
            total_frames=history_frames,
        )
        history = jnp.zeros((batch, history_frames, *latent_size, model.config.latent_channels))
        seeds = jnp.asarray(seeds, jnp.uint32)
        return Sequence(cache, history, seeds, jnp.zeros((), jnp.int32), jnp.asarray(text), switch)

    def roll_out(
        self,
        params: Params,
        sequence: Sequence,
        exit_steps: Array,
        *,
        opening: bool,
        keep_context: bool,
    ) -> tuple[Sequence, Rollout]:
        """Generates the next frames of a sequence, without gradient.

        Args:
          params: the transformer's parameters.
          sequence: where it stands.
          exit_steps: int32 `[blocks]` in [0, number of sampler steps), see `draw_exit_steps`.
          opening: whether these are the first frames of the sequence. Later ones need a full cache.
          keep_context: whether the gradient is wanted (False saves the memory of `Rollout.kept`).

        Returns:
          The sequence after them, and the frames.
        """
        params = jax.lax.stop_gradient(params)
        blocks, block = exit_steps.shape[0], self.generator.window.block_frames
        first, switch = sequence.frame, sequence.switch
        given = _Given(
            before=self.generator.encode_text(params, sequence.text),
            after=None if switch is None else self.generator.encode_text(params, switch.text),
            switch_frame=None if switch is None else switch.frame,
            seeds=sequence.seeds,
        )
        kept = _timeline(sequence.cache, blocks * block, opening=opening) if keep_context else None
        past = 0 if opening else sequence.cache.slots

        def one_block(carry: _Carry, step: tuple[Array, Array]) -> tuple[_Carry, tuple[Array, Array]]:
            index, exit_step = step
            at = past + index * block
            return self._block(params, given, carry, exit_step, at, opening=opening)

        carry = _Carry(sequence.cache, sequence.history, sequence.frame, kept)
        order = jnp.arange(blocks, dtype=jnp.int32)
        carry, (inputs, latents) = jax.lax.scan(one_block, carry, (order, exit_steps))
        after = dataclasses.replace(
            sequence, cache=carry.cache, history=carry.history, frame=first + blocks * block
        )
        text, graded, opens = _judged_by(sequence, blocks=blocks, block=block)
        return after, Rollout(
            latents=_joined(latents),
            before=sequence.history,
            first=first,
            text=text,
            graded=graded,
            opens=opens,
            exit_inputs=_joined(inputs),
            exit_steps=jnp.repeat(exit_steps, block),
            kept=carry.kept,
        )

    def latents(self, params: Params, rollout: Rollout) -> Array:
        """The frames of a rollout as a differentiable function of the parameters.

        Args:
          params: the parameters the rollout was made with.
          rollout: made with `keep_context`.

        Returns:
          `[B, F, h, w, C]` float32, equal to `rollout.latents` up to rounding; frames that are not
          graded have no gradient.
        """
        if rollout.kept is None:
            raise ValueError("the rollout was made without keep_context: it has no gradient")
        steps = schedule.few_step_table(self.generator.sampler)
        text = self.generator.encode_text(params, rollout.text)
        inputs = rollout.exit_inputs
        opening = rollout.kept.key.shape[2] == inputs.shape[1]
        linked = self.cache_gradient == "straight_through" or (self.cache_gradient == "opening" and opening)
        through = rollout.graded.astype(jnp.float32) if linked else None
        timesteps = jnp.asarray(steps.timesteps)[rollout.exit_steps]
        result: Any = self.generator.transformer.apply(
            {"params": params},
            inputs,
            jnp.broadcast_to(timesteps, inputs.shape[:2]),
            jax.lax.stop_gradient(text) if self.text_gradient == "none" else text,
            positions=rollout.first + jnp.arange(inputs.shape[1], dtype=jnp.int32),
            context=ClipContext(rollout.kept.key, rollout.kept.value, through, self.generator.window),
        )
        sigma = jnp.asarray(steps.sigmas)[rollout.exit_steps]
        x0 = inputs - sigma[:, None, None, None] * result[0]
        return jnp.where(rollout.graded[:, None, None, None], x0, rollout.latents)

    def _block(
        self,
        params: Params,
        given: "_Given",
        carry: "_Carry",
        exit_step: Array,
        at: Array,
        *,
        opening: bool,
    ) -> tuple["_Carry", tuple[Array, Array]]:
        """One block of the rollout, which starts at timeline frame `at`: (exit input, x0)."""
        generator, frame = self.generator, carry.frame
        block = generator.window.block_frames
        positions = frame + jnp.arange(block, dtype=jnp.int32)
        text = given.text_at(frame)
        cache, kept = carry.cache, carry.kept
        if given.switch_frame is not None:
            switches = (given.switch_frame <= frame) & (frame < given.switch_frame + block)
            cache, kept = rebuild_after_switch(
                functools.partial(generator.context_pass, params, text),
                cache,
                kept,
                history=carry.history,
                frame=frame,
                at=at,
                switches=switches,
                opening=opening,
                keep_sink=self.keep_sink,
            )
        context = cache_lib.context(cache)

        def velocity(noisy: Array, timestep: Array) -> Array:
            return generator.velocity(params, noisy, timestep, text, positions, context)[0]

        height, width, channels = carry.history.shape[2:]

        def noise(step: Array) -> Array:
            return generator.noise(given.seeds, positions, step, (height, width, channels))

        exit_input, latents = self._denoise_to_exit(velocity, noise, exit_step)
        seen = latents
        if self.renoise_context:
            sampler = generator.sampler
            sigma = FlowSchedule(sampler.shift).sigma(jnp.float32(sampler.context_noise))
            seen = (1 - sigma) * latents + sigma * noise(jnp.int32(len(sampler.steps)))
        own = generator.context_pass(params, text, seen, positions, context)
        if kept is not None:
            kept = cache_lib.place(kept, own, at)
        history = jnp.concatenate([carry.history, latents], axis=1)[:, block:]
        cache = cache_lib.write(cache, own, frame)
        return _Carry(cache, history, frame + block, kept), (exit_input, latents)

    def _denoise_to_exit(
        self, velocity: Callable[[Array, Array], Array], noise: Callable[[Array], Array], exit_step: Array
    ) -> tuple[Array, Array]:
        """The noisy input of the exit step and the x0 found from it; the steps after it never run."""
        table = schedule.few_step_table(self.generator.sampler)
        timesteps, sigmas, next_sigmas = (
            jnp.asarray(column) for column in (table.timesteps, table.sigmas, table.next_sigmas)
        )

        def one_pass(k: Array, noisy: Array) -> Array:
            x0 = noisy - sigmas[k] * velocity(noisy, timesteps[k])
            return (1 - next_sigmas[k]) * x0 + next_sigmas[k] * noise(k + 1)

        start = noise(jnp.int32(noise_lib.INITIAL_STEP))
        exit_input = jax.lax.fori_loop(0, exit_step, one_pass, start)
        x0 = exit_input - sigmas[exit_step] * velocity(exit_input, timesteps[exit_step])
        return exit_input, x0


def draw_exit_steps(key: PRNGKey, blocks: int, steps: int, *, same_for_all_blocks: bool = True) -> Array:
    """Exit steps of one clip, uniform in [0, steps), int32 `[blocks]`.

    Args:
      key: the same on all devices: the blocks of the whole batch leave at the same steps.
      blocks: number of blocks.
      steps: number of sampler steps.
      same_for_all_blocks: one draw shared by all blocks (the release's choice), or one each.
    """
    drawn = jax.random.randint(key, (1 if same_for_all_blocks else blocks,), 0, steps, jnp.int32)
    return jnp.broadcast_to(drawn, (blocks,))


# --- within a rollout -----------------------------------------------------------------------------


@pytree
class _Carry:
    """What goes from block to block."""

    cache: KVCache
    history: Array
    frame: Array
    kept: BlockKV | None


@pytree
class _Given:
    """What stays the same for all blocks: prompts before and after the switch, seeds."""

    before: TextContext
    after: TextContext | None
    switch_frame: Array | None
    seeds: Array

    def text_at(self, frame: Array) -> TextContext:
        """The prompt of a block that starts at `frame`."""
        if self.after is None or self.switch_frame is None:
            return self.before
        switched = frame >= self.switch_frame
        return jax.tree.map(lambda new, old: jnp.where(switched, new, old), self.after, self.before)


def _judged_by(sequence: Sequence, *, blocks: int, block: int) -> tuple[Array, Array, Array]:
    """The prompt of the next clip as a whole, which of its frames carry gradient, which are `opens`."""
    starts = sequence.frame + block * jnp.arange(blocks, dtype=jnp.int32)
    opens = starts == 0
    if sequence.switch is None:
        return sequence.text, jnp.ones(blocks * block, bool), jnp.repeat(opens, block)
    frame = sequence.switch.frame
    switched = starts >= frame  # [blocks], at the end all or, if none, not yet
    text = jnp.where(switched[-1], sequence.switch.text, sequence.text)
    opens |= switched & (starts < frame + block)
    return text, jnp.repeat(switched | ~switched[-1], block), jnp.repeat(opens, block)


def _timeline(cache: KVCache, frames: int, *, opening: bool) -> BlockKV:
    """Room for the keys and values of a clip behind those of the cache (none at the opening)."""
    past = 0 if opening else cache.slots
    layers, batch, _, *token = cache.key.shape
    room = jnp.zeros((layers, batch, past + frames, *token), cache.key.dtype)
    timeline = BlockKV(room, room)
    return timeline if opening else cache_lib.place(timeline, cache_lib.in_order(cache), jnp.int32(0))


def _joined(blocks: Array) -> Array:
    """`[blocks, B, n, ...]` to `[B, blocks * n, ...]`."""
    blocks = blocks.swapaxes(0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])
