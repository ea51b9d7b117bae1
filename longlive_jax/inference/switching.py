"""What a prompt switch does: to the text a video runs under, and to the cache.

Both ways to generate, a story that is known in advance (`Pipeline.stream`) and a live `Session`, go
through these two: a `PromptTrack` per video says what text the next block has and what becomes of the
cache, and `switch_prompts` does it, for the samples of a batch together where they agree.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import SwitchConfig, SwitchPolicy
from longlive_jax.inference import rollout
from longlive_jax.inference.story import BlendCurve
from longlive_jax.types import Array, ArrayLike, Params

_KEEP = SwitchConfig(policy="keep")
_NEARLY_PARALLEL = 1e-4  # radians; beyond float32 a direction between the two is not defined


def switch_prompts(
    generator: rollout.Generator,
    params: Params,
    state: rollout.RolloutState,
    text: ArrayLike,
    due: Mapping[int, SwitchConfig],
) -> rollout.RolloutState:
    """Switches some samples of a batch to new prompts, together where their policies agree.

    Args:
      generator: the rollout.
      params: the transformer's parameters.
      state: the state between two blocks; consumed.
      text: `[B, M, text_dim]` new prompt embeddings (any values for the other samples).
      due: sample index to how it switches.

    Returns:
      The state for the next block.
    """
    frame = int(state.frame)
    starts, ring_starts = np.asarray(state.cache.start), np.asarray(state.cache.ring_start)

    def how(index: int) -> tuple[SwitchPolicy, int, bool]:
        if due[index].policy != "recache":
            return due[index].policy, 0, False
        extent = generator.recache_extent(
            frame=frame,
            start=int(starts[index]),
            ring_start=int(ring_starts[index]),
            keep_sink=due[index].keep_sink,
        )
        return "recache", *extent

    plain = {"keep": rollout.keep, "clear": rollout.clear, "flush": rollout.flush, "cut": rollout.cut}
    for (policy, frames, keeps), group in itertools.groupby(sorted(due, key=how), key=how):
        mask = np.zeros(len(starts), bool)
        mask[list(group)] = True
        arguments = (generator, params, state, text, mask)
        if policy == "recache":
            state = rollout.recache(*arguments, frames=frames, keep_sink=keeps)
        else:
            state = plain[policy](*arguments)
    return state


@dataclasses.dataclass(frozen=True)
class PromptTrack:
    """The text of one video from block to block; immutable, `next_block` returns the next one.

    Attributes:
      shown: `[M, text_dim]` embedding the latest block ran under.
      origin: the embedding a blend under way began with.
      target: the embedding a switch or a blend under way leads to; None if there is none.
      how: what happens to the cache when the target is reached.
      blocks: blocks the way takes; 1 is a plain switch.
      done: how many of them are done.
      curve: the way.
    """

    shown: Array
    origin: Array | None = None
    target: Array | None = None
    how: SwitchConfig = _KEEP
    blocks: int = 1
    done: int = 0
    curve: BlendCurve = "linear"

    def switched(
        self, text: Array, how: SwitchConfig, *, blocks: int = 1, curve: BlendCurve = "linear"
    ) -> "PromptTrack":
        """Sets out for another text; what was under way goes on from where it is.

        Args:
          text: `[M, text_dim]` embedding of the new prompt.
          how: what happens to the cache with the block that runs under it alone.
          blocks: until then, in equal steps; the blocks before only change their text.
          curve: the way there.
        """
        return PromptTrack(self.shown, self.shown, text, how, blocks, 0, curve)

    @property
    def weight(self) -> float:
        """How much of the latest block's text is that of the new prompt, in (0, 1]."""
        return 1.0 if self.target is None else self.done / self.blocks

    def next_block(self) -> tuple["PromptTrack", SwitchConfig | None]:
        """The track under the next block, and what happens to the cache; None if the text stays."""
        if self.origin is None or self.target is None:
            return self, None
        if self.done + 1 == self.blocks:
            return PromptTrack(self.target), self.how
        shown = mix(self.origin, self.target, (self.done + 1) / self.blocks, curve=self.curve)
        return dataclasses.replace(self, shown=shown, done=self.done + 1), _KEEP


@functools.partial(jax.jit, static_argnames="curve")
def mix(first: Array, second: Array, weight: Array | float, *, curve: BlendCurve) -> Array:
    """A text embedding between two.

    Args:
      first: `[M, text_dim]`.
      second: `[M, text_dim]`.
      weight: 0 gives `first`, 1 gives `second`.
      curve: "linear", or "spherical": every token's direction turns at a constant rate while its length
        changes linearly. Tokens that only one of the prompts has, and opposite ones, go linearly.

    Returns:
      `[M, text_dim]` in the dtype of `first`.
    """
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    straight = (1 - weight) * a + weight * b
    if curve == "linear":
        return straight.astype(first.dtype)
    length_a, length_b = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    has_both = (length_a > 0) & (length_b > 0)
    unit_a = a / jnp.where(has_both, length_a, 1)
    unit_b = b / jnp.where(has_both, length_b, 1)
    angle = jnp.arccos(jnp.clip(jnp.sum(unit_a * unit_b, axis=-1, keepdims=True), -1, 1))
    turns = has_both & (angle > _NEARLY_PARALLEL) & (angle < jnp.pi - _NEARLY_PARALLEL)
    angle = jnp.where(turns, angle, 1.0)
    direction = (jnp.sin((1 - weight) * angle) * unit_a + jnp.sin(weight * angle) * unit_b) / jnp.sin(angle)
    turned = direction * ((1 - weight) * length_a + weight * length_b)
    return jnp.where(turns, turned, straight).astype(first.dtype)
