"""What a session gives out, and what it stands for between two blocks."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import numpy as np

from longlive_jax.config import PipelineConfig, SwitchPolicy
from longlive_jax.inference.pipeline import StreamState
from longlive_jax.inference.story import BlendCurve
from longlive_jax.inference.switching import PromptTrack
from longlive_jax.session.recording import Event
from longlive_jax.types import Array

Place = Literal["device", "host"]
"""Where a snapshot lies: beside the model, at once; or in host memory, after a wait for the device."""


class SessionError(RuntimeError):
    """Generation failed; `Session.restart` goes back to the last good snapshot."""


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds; `dispatched` and `ready` count from the start of the session.

    Attributes:
      dispatched: when the device was told.
      ready: when the frames had arrived.
      interval: since the frames of the block before were ready; None for the first.
      response: from the request of the switch that begins with this block until `ready`; else None.
    """

    dispatched: float
    ready: float
    interval: float | None
    response: float | None


@dataclasses.dataclass(frozen=True)
class BlockInfo:
    """What the frames of one block are.

    Attributes:
      block: counts from 0.
      frame: first latent frame.
      prompt: what they show, or are on the way to.
      policy: what happened to the cache before this block, where the text changed; else None.
      weight: how far a blend has come, in (0, 1]; 1 under one prompt alone.
      seed: of their noise.
      timings: when.
    """

    block: int
    frame: int
    prompt: str
    policy: SwitchPolicy | None
    weight: float
    seed: int
    timings: Timings


class FrameBlock(NamedTuple):
    """(index of the first video frame, frames uint8 `[n, Y, X, 3]`, what they are)."""

    first: int
    frames: np.ndarray
    info: BlockInfo


@dataclasses.dataclass(frozen=True)
class Moment:
    """A session between two blocks.

    Attributes:
      stream: the device's state; the next block consumes it.
      track: the text.
      prompt: what it is, or leads to.
      config: of the next block.
      seed: of the next block.
      block: the next one.
      frame: its first latent frame.
      events: what has led here since the first block.
    """

    stream: StreamState
    track: PromptTrack
    prompt: str
    config: PipelineConfig
    seed: int
    block: int = 0
    frame: int = 0
    events: tuple[Event, ...] = ()


@dataclasses.dataclass(frozen=True)
class Flight:
    """A block the device is working on.

    Attributes:
      index: its first video frame.
      pixels: uint8 `[1, n, Y, X, 3]`, when they are ready.
      info: what they are; only `dispatched` of its timings is known.
      requested: when the switch that begins with it was asked for (`time.perf_counter`), or None.
    """

    index: int
    pixels: Array
    info: BlockInfo
    requested: float | None


@dataclasses.dataclass(frozen=True)
class SwitchRequest:
    """A switch that waits for its frame; None in `at` is the next block, elsewhere the config's value."""

    prompt: str
    text: Array
    at: int | None
    policy: SwitchPolicy | None
    keep_sink: bool | None
    blend_frames: int
    curve: BlendCurve
    requested: float


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A session as it was: `Session.restore` and `Session.fork` go on from it, any number of times.

    Attributes:
      moment: the state; its arrays are copies.
      flight: the block that was under way and is handed out first, or None.
      requests: switches that were waiting for their frame.
      place: where the arrays are.
    """

    moment: Moment
    flight: Flight | None
    requests: tuple[SwitchRequest, ...]
    place: Place

    @property
    def block(self) -> int:
        """The next block to be generated."""
        return self.moment.block

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.moment.stream))
