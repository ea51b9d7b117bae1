"""Sessions without a model: the frames are drawn by the toy world's renderer from the prompts.

They take requests, snapshots and branches like `Session`, one block ahead, so that what is tested is the
studio around them, and the toy's measurement can say what a browser shows. Nothing is compiled.
"""

import dataclasses
import threading
import time
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from longlive_jax.config import PipelineConfig, preset
from longlive_jax.config_dict import override
from longlive_jax.errors import require
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import frame_of
from longlive_jax.session import BlockInfo, FrameBlock, Recording, SessionError, Timings
from longlive_jax.session.recording import ChangeEvent, Event, SwitchEvent
from longlive_jax.toy import grammar, measure, renderer
from longlive_jax.toy.world import COLOUR, VALUES, World, sample_scenes

WORLD = World()
_KEEP_DELAY = 2  # blocks a drawn "keep" takes to obey
RED = "a red square moving right on a dark background"
BLUE = "a blue square moving down on a dark background"
GREEN = "a green square moving left on a dark background"


def pipeline() -> Pipeline:
    """The toy's config without weights."""
    config = override(preset("toy"), {"window.rope": "relative"})
    return Pipeline(config, {}, {}, lambda prompts: jnp.zeros((len(prompts), 1)))


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a session is between two blocks."""

    block: int
    config: PipelineConfig
    seed: int
    events: tuple[Event, ...] = ()
    stream: tuple[()] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """See `longlive_jax.session.Snapshot`."""

    moment: Moment
    flight: int | None
    requests: tuple[Any, ...] = ()
    nbytes: int = 1000


class DrawnSession:
    """What a studio uses of a `Session`.

    Attributes:
      failing: raises at the next block while set; of the class, so that a test can reach it.
      seconds: that generating a block takes.
      open: sessions that were not closed.
    """

    failing = threading.Event()
    seconds = 0.0
    open: ClassVar[set["DrawnSession"]] = set()

    def __init__(
        self, pipe: Pipeline, prompt: str, *, seed: int = 0, start: Snapshot | None = None, **_: Any
    ) -> None:
        self._pipe, self._prompt, self._seed = pipe, prompt, seed
        self._now = Moment(0, pipe.config, seed) if start is None else start.moment
        self._flight = None if start is None else start.flight
        self._requests: list[Event] = []
        self._script: dict[int, list[Event]] = {}
        self.open.add(self)

    @property
    def next_block(self) -> int:
        return self._now.block

    def __next__(self) -> FrameBlock:
        time.sleep(self.seconds)
        if self._flight is None:
            self._flight = self._dispatch()
        ready, self._flight = self._flight, self._dispatch()
        vae, size = self._pipe.config.vae, self._pipe.config.window.block_frames
        first, end = (vae.video_frames(block * size) for block in (ready, ready + 1))
        switches = [e for e in self._now.events if isinstance(e, SwitchEvent) and e.block <= ready]
        begins = bool(switches) and switches[-1].block == ready
        info = BlockInfo(
            block=ready,
            frame=ready * size,
            prompt=switches[-1].prompt if switches else self._prompt,
            policy=switches[-1].policy if begins else None,
            weight=1.0,
            seed=self._now.seed,
            timings=Timings(0.0, 0.0, None, 0.1 if begins else None),
        )
        return FrameBlock(first, self._draw(switches, first, end - first), info)

    def switch(
        self, prompt: str, *, at: int | None = None, blend: str | None = None, curve: str = "linear"
    ) -> None:
        grammar.parse(prompt)
        block = 0 if at is None else -(-at // self._pipe.config.window.block_frames)
        frames = frame_of("blend", blend or 0, vae=self._pipe.config.vae, fps=16, is_duration=True)
        self._requests.append(SwitchEvent(block, prompt, "recache", True, frames, curve))  # type: ignore[arg-type]

    def change(self, settings: Any = None, *, seed: int | None = None) -> None:
        sink = (settings or {}).get("window.sink_frames", 0)
        require(sink <= self._now.config.window.sink_frames, "the sink cannot grow")
        self._requests.append(ChangeEvent(0, seed, dict(settings or {})))

    def snapshot(self, *, place: str = "device") -> Snapshot:
        return Snapshot(self._now, self._flight)

    def save(self, path: Any) -> None:
        size = self._pipe.config.video
        Recording(
            self._prompt, self._seed, size.height, size.width, self._pipe.config,
            self._now.block, self._now.events, None,
        ).save(path)  # fmt: skip

    @classmethod
    def load(cls, path: Any, pipe: Pipeline) -> "DrawnSession":
        recording = Recording.read(path)
        session = cls(pipe, recording.prompt, seed=recording.seed)
        for event in recording.events:
            session._script.setdefault(event.block, []).append(event)
        return session

    def close(self) -> None:
        self.open.discard(self)

    def _dispatch(self) -> int:
        now = self._now
        if self.failing.is_set():
            raise SessionError(f"block {now.block} failed: on purpose")
        due = [event for event in self._requests if event.block <= now.block]
        self._requests = [event for event in self._requests if event not in due]
        script = self._script.get(now.block, [])
        for number, asked in enumerate([*script, *due]):
            event = dataclasses.replace(asked, block=now.block)
            if isinstance(event, ChangeEvent):
                config = override(now.config, event.settings)
                seed = now.seed if event.seed is None else event.seed
                now = dataclasses.replace(now, config=config, seed=seed)
            elif number >= len(script):
                event = dataclasses.replace(event, policy=now.config.switch.policy)
            now = dataclasses.replace(now, events=(*now.events, event))
        self._now = dataclasses.replace(now, block=now.block + 1)
        return now.block

    def _draw(self, switches: list[SwitchEvent], first: int, count: int) -> np.ndarray:
        vae, size = self._pipe.config.vae, self._pipe.config.window.block_frames
        starts, prompts = [0], [self._prompt]
        for event in switches:
            delay = _KEEP_DELAY if event.policy == "keep" else 0
            starts.append(max(vae.video_frames((event.block + delay) * size), starts[-1] + 1))
            prompts.append(event.prompt)
        codes = np.array([[grammar.parse(prompt).codes for prompt in prompts]], np.int32)
        scenes, story = sample_scenes(WORLD, seed=0, indices=[0]), renderer.Story(tuple(starts), codes)
        video = renderer.render_story(WORLD, scenes, story, frames=count, first_frame=first)
        return np.round((video[0] + 1) * 127.5).astype(np.uint8)


def colour_of(frame: np.ndarray) -> str:
    """The colour of the sprite in a frame uint8 [Y, X, 3], as the toy's measurement reads it."""
    code = measure.read(WORLD, frame[None].astype(np.float32) / 127.5 - 1).codes[0, 0, COLOUR]
    return "unknown" if code == measure.UNKNOWN else VALUES["colour"][code]
