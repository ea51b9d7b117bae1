"""Streaming long tuning: one long video per sequence, one clip of it per iteration.

The first clip of a sequence is all new. Each later one is `new_frames` new frames behind an overlap
with the old ones, so that teacher and critic always see `clip_frames`. They expect an image latent
in front, as every video has: the clip's first latent is replaced by the encoding of the video frame
decoded there. The loss counts the new frames alone.

    sequence = streaming.forcing.begin(...)                      # prompts, seeds, a switch frame
    sequence, rollout = streaming.advance(params, sequence, exit_steps, new_frames=21)
    sequence, rollout = streaming.advance(params, sequence, exit_steps, new_frames=18)   # and so on
    latents = forcing.latents(params, rollout)                   # inside the loss; `rollout.latents` else
    clip, mask = streaming.clip(rollout, latents, decode=..., encode=...)

The state is explicit (`Sequence`), so it can be saved with the rest of the training state. A program
is compiled for the first clip and one for each choice of `new_frames`; positions are traced.

Source: LongLive `model/streaming_training.py` (v1.0).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from longlive_jax.errors import require
from longlive_jax.training.rollout import Rollout, SelfForcing, Sequence, Switch
from longlive_jax.types import Array, Params

Decode = Callable[[Array], Array]
"""Latents `[B, F, h, w, C]` of the start of a video to its frames `[B, V, Y, X, 3]`."""

Encode = Callable[[Array], Array]
"""A video of one frame `[B, 1, Y, X, 3]` to its latent `[B, 1, h, w, C]`."""


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How sequences are cut into clips. Hashable: a static argument of `jax.jit`.

    Attributes:
      forcing: how clips are generated.
      clip_frames: latent frames of a clip as teacher and critic see it; all new in the first clip. Also
        the frames a recache at a prompt switch looks back on.
      new_frames: choices for the number of new frames of later clips.
      sequence_frames: a sequence ends when the smallest choice no longer fits.
    """

    forcing: SelfForcing
    clip_frames: int = 21
    new_frames: tuple[int, ...] = (18,)
    sequence_frames: int = 240

    def __post_init__(self) -> None:
        window = self.forcing.generator.window
        block, needed = window.block_frames, window.window_frames
        require(
            window.is_bounded,
            "window.window_frames=-1 keeps everything; streaming needs a bounded window",
        )
        require(
            self.clip_frames % block == 0 and self.clip_frames >= needed,
            f"clip_frames={self.clip_frames} must be a multiple of window.block_frames={block} and at least "
            f"window.window_frames={needed}",
        )
        require(
            len(self.new_frames) > 0
            and all(0 < n < self.clip_frames and n % block == 0 for n in self.new_frames),
            f"new_frames={self.new_frames} must be multiples of window.block_frames={block} below "
            f"clip_frames={self.clip_frames}",
        )
        require(
            self.sequence_frames >= self.clip_frames,
            f"sequence_frames={self.sequence_frames} must hold one clip of {self.clip_frames}",
        )

    def begin(
        self, text: Array, seeds: Array, *, latent_size: tuple[int, int], switch: Switch | None = None
    ) -> Sequence:
        """A sequence before its first clip; arguments as in `SelfForcing.begin`."""
        return self.forcing.begin(
            text, seeds, latent_size=latent_size, history_frames=self.clip_frames, switch=switch
        )

    def choices(self, frame: int) -> tuple[int, ...]:
        """The numbers of new frames that may follow the first `frame` ones; empty at the end."""
        choices = (self.clip_frames,) if frame == 0 else self.new_frames
        return tuple(n for n in choices if frame + n <= self.sequence_frames)

    def advance(
        self,
        params: Params,
        sequence: Sequence,
        exit_steps: Array,
        *,
        new_frames: int,
        keep_context: bool = True,
    ) -> tuple[Sequence, Rollout]:
        """Generates the next clip's new frames, without gradient.

        Args:
          params: the transformer's parameters.
          sequence: where it stands.
          exit_steps: int32 `[new_frames // block_frames]`.
          new_frames: one of `choices(sequence.frame)`.
          keep_context: whether the gradient is wanted (a critic iteration has no use for it).
        """
        block = self.forcing.generator.window.block_frames
        if exit_steps.shape != (new_frames // block,):
            raise ValueError(f"exit_steps {exit_steps.shape} must be ({new_frames // block},)")
        return self.forcing.roll_out(
            params,
            sequence,
            exit_steps,
            opening=new_frames == self.clip_frames,
            keep_context=keep_context,
        )

    def clip(
        self, rollout: Rollout, latents: Array, *, decode: Decode, encode: Encode
    ) -> tuple[Array, Array]:
        """The clip that teacher and critic see.

        Args:
          rollout: of `advance`.
          latents: its new frames, with or without gradient.
          decode: the VAE's decoder.
          encode: its encoder.

        Returns:
          `[B, clip_frames, h, w, C]`, and bool `[clip_frames]`: the frames that the loss counts.
        """
        overlap = self.clip_frames - latents.shape[1]
        mask = jnp.arange(self.clip_frames) >= overlap
        if overlap == 0:
            return latents, mask
        # The decoder is causal: the last frame of the video is what lies at the clip's first latent.
        upto = rollout.before[:, : rollout.before.shape[1] - overlap + 1]
        image = jax.lax.stop_gradient(encode(decode(upto)[:, -1:])).astype(latents.dtype)
        older = rollout.before[:, rollout.before.shape[1] - overlap + 1 :]
        return jnp.concatenate([image, older, latents], axis=1), mask
