"""A running video that listens.

    with Session(Pipeline.load("checkpoints/longlive-1.3b"), "A red fox runs through snow.") as session:
        for index, frames, info in session:  # frames: uint8 [n, Y, X, 3]
            if info.block == 5:
                session.switch("The fox stops.", policy="recache")

One thread iterates; every other method may be called from any thread. Requests are queued and taken up
at the next block boundary. The block after the one that is being handed out is on the device already,
so that the device never waits for the host: a request changes the block after that.

The session is a thin state machine over `Pipeline.begin`, `switch` and `advance`. What it stands for
between two blocks is one value, a `Moment`, so a snapshot is a copy and a branch is another session.
"""

import contextlib
import dataclasses
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

from longlive_jax import config_dict
from longlive_jax.config import PipelineConfig, SwitchPolicy
from longlive_jax.diffusion import noise
from longlive_jax.errors import require
from longlive_jax.inference import story as story_lib
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import BlendCurve
from longlive_jax.session import turn
from longlive_jax.session.recording import ChangeEvent, Event, Recording, SwitchEvent
from longlive_jax.session.types import (
    Flight,
    FrameBlock,
    Moment,
    Place,
    SessionError,
    Snapshot,
    SwitchRequest,
    Timings,
)
from longlive_jax.storage import PathLike

_CHANGEABLE = ("window", "sampler", "switch")


class Session:
    """One live video.

    Attributes:
      size: {"height", "width"} in pixels.
      limit: block before which the iteration ends, or None; may be moved while the session runs.
      recorded_blocks: blocks of the file this session was loaded from, see `load`.
    """

    # What a restore sets anew.
    _now: Moment
    _flight: Flight | None
    _requests: list[SwitchRequest]
    _changes: list[ChangeEvent]
    _planned: PipelineConfig  # of the next block, once all changes have been taken up
    _failure: SessionError | None
    _last_ready: float | None

    def __init__(
        self,
        pipe: Pipeline,
        prompt: str,
        *,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        blocks: int | None = None,
        keep_blocks: int = 0,
        keep_place: Place = "device",
        text_seconds: float = 60.0,
        start: Snapshot | None = None,
    ) -> None:
        """Encodes the prompt; nothing is generated yet.

        Args:
          pipe: the models.
          prompt: what the video shows first.
          seed: in [0, 2**32).
          height: pixels; default from the config.
          width: pixels; default from the config.
          blocks: end after so many; None goes on until `stop`.
          keep_blocks: keep a snapshot before each of the latest so many blocks, to `rewind` to.
          keep_place: where those lie.
          text_seconds: the text encoder's weights are let go when no prompt has needed them for so long.
          start: go on from this snapshot of a session with the same arguments; see `fork`.

        Raises:
          UserError: an argument does not fit.
        """
        self.size = turn.check_start(pipe.config, prompt, seed=seed, height=height, width=width)
        pipe.check_vae()
        require(keep_blocks >= 0, f"keep_blocks={keep_blocks} must be 0 or more")
        self.limit, self.recorded_blocks = blocks, 0
        self._pipe, self._prompt, self._seed = pipe, prompt, seed
        self._keep_place, self._text_seconds = keep_place, text_seconds
        self._began = time.perf_counter()
        self._turn = threading.Lock()  # held while a block is dispatched or the state is taken
        self._changed = threading.Condition()  # guards the queues; may be taken inside `_turn`, not around it
        self._kept: deque[Snapshot] = deque(maxlen=keep_blocks)
        self._given: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._script: Mapping[int, list[Event]] = {}
        self._is_paused = self._is_stopped = False
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(pipe.text_encoder_open())
        with self._changed:
            if start is None:
                self._reset(self._first(), None, ())
            else:
                self._set(start, start.flight)

    # --- frames ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[FrameBlock]:
        return self

    def __next__(self) -> FrameBlock:
        """The next block's frames; waits for the device, and while the session is paused.

        Raises:
          StopIteration: after `stop`, or at `limit`.
          SessionError: generation failed.
        """
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._is_paused or self._flight is not None or self._failure is not None
                )
            with self._turn:
                if self._failure is not None:
                    raise self._failure
                ready, self._flight = self._flight, None
                goes_on = self._goes_on()
                if goes_on:
                    try:
                        self._flight = self._dispatch()
                    except Exception as error:
                        failure = self._failed(self._now.block, error)
                        if ready is None:
                            raise failure from error  # else the next call raises it
            if ready is not None:
                return self._delivered(ready)
            if not goes_on and not self._is_paused:
                with self._changed:
                    self._changed.notify_all()  # nobody shall wait for a block that does not come
                raise StopIteration

    @property
    def config(self) -> PipelineConfig:
        """The config of the next block that can still be changed."""
        return self._now.config

    @property
    def prompt(self) -> str:
        """The prompt of the block before that one."""
        return self._now.prompt

    @property
    def is_paused(self) -> bool:
        """Whether generation waits for `resume`."""
        return self._is_paused

    @property
    def next_block(self) -> int:
        """The first block that a request made now can change."""
        return self._now.block

    # --- requests --------------------------------------------------------------------------------

    def switch(
        self,
        prompt: str,
        *,
        at: int | str | None = None,
        policy: SwitchPolicy | None = None,
        keep_sink: bool | None = None,
        blend: int | str | None = None,
        curve: BlendCurve = "linear",
    ) -> None:
        """Asks for another prompt. Of several requests for the same block the last one counts.

        The prompt is encoded here, in the caller's thread, while the video goes on.

        Args:
          prompt: what to show.
          at: the first block that begins at this latent frame (40) or time ("10s") or later; None: the
            next block that can still be changed.
          policy: what happens to the cache; None is the config's `switch.policy`.
          keep_sink: whether a recache leaves the sink alone; None is the config's.
          blend: latent frames (12) or seconds ("3s") on the way from the old prompt to this one.
          curve: the way.

        Raises:
          UserError: an argument does not fit, or `at` has passed. The session goes on as before.
        """
        requested = time.perf_counter()
        vae, fps = self._pipe.config.vae, self._pipe.config.video.fps
        frame = None if at is None else story_lib.frame_of("at", at, vae=vae, fps=fps)
        blend = 0 if blend is None else blend
        blend_frames = story_lib.frame_of("blend", blend, vae=vae, fps=fps, is_duration=True)
        story_lib.check_switch(
            prompt, policy=policy, keep_sink=keep_sink, blend_frames=blend_frames, curve=curve
        )
        self._check_frame(frame)
        text = self._pipe.encode_prompts([prompt])[0]
        request = SwitchRequest(prompt, text, frame, policy, keep_sink, blend_frames, curve, requested)
        with self._changed:
            self._check_frame(frame)
            self._requests.append(request)

    def change(self, settings: Mapping[str, Any] | None = None, *, seed: int | None = None) -> None:
        """Asks for another seed, or other window, sampler or switch settings, from the next block on.

        Another window keeps the frames it has room for; a larger one fills with the next blocks. A window
        or steps that were not used before are compiled first.

        Args:
          settings: dotted config names to values, e.g. `{"sampler.steps": (1000, 500)}`.
          seed: in [0, 2**32).

        Raises:
          UserError: a name or value does not fit. The session goes on as before.
        """
        settings = dict(settings or {})
        require(bool(settings) or seed is not None, "give settings or a seed to change")
        if seed is not None:
            noise.seed_array(seed, 1)
        for name in settings:
            require(
                name.split(".")[0] in _CHANGEABLE,
                f"{name} cannot change while a session runs; {', '.join(_CHANGEABLE)} settings can",
            )
        with self._changed:
            self._check_open()
            planned = config_dict.override(self._planned, settings)
            turn.check_window(planned)
            old, new = self._planned.window.sink_frames, planned.window.sink_frames
            require(
                new <= old,
                f"window.sink_frames={new}: the sink of {old} frames cannot grow in a running video",
            )
            self._planned = planned
            self._changes.append(ChangeEvent(0, seed, settings))

    def pause(self) -> None:
        """Holds generation after the block under way; the iterating thread waits until `resume`."""
        with self._changed:
            self._check_open()
            self._is_paused = True

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends the iteration once the block under way has been handed out."""
        with self._changed:
            self._is_stopped, self._is_paused = True, False
            self._changed.notify_all()

    def settle(self, timeout: float | None = None, *, include_scheduled: bool = False) -> bool:
        """Waits until what was asked for has been taken up, or the session has ended or failed.

        Args:
          timeout: seconds to wait at most.
          include_scheduled: wait for switches that were asked for with `at`, too.

        Returns:
          False if the time is up before that.
        """

        def is_settled() -> bool:
            waits = bool(self._changes) or any(
                include_scheduled or request.at is None for request in self._requests
            )
            return not waits or self._is_over() or self._failure is not None

        with self._changed:
            return self._changed.wait_for(is_settled, timeout)

    def close(self) -> None:
        """Stops, and lets the text encoder go."""
        self.stop()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- branches --------------------------------------------------------------------------------

    def snapshot(self, *, place: Place = "device") -> Snapshot:
        """Keeps the session as it is now; `Snapshot.nbytes` says what that takes."""
        with self._turn:
            if self._failure is not None:
                raise self._failure
            snapshot = self._copied(self._flight, place)
        self._given.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot; what was asked for since is forgotten."""
        with self._turn, self._changed:
            self._set(snapshot, snapshot.flight)

    def rewind(self, block: int) -> None:
        """Goes back to the beginning of a kept block, which is then the next one to be generated.

        Raises:
          UserError: it is not kept; the message names those that are.
        """
        with self._turn, self._changed:
            kept = {snapshot.block: snapshot for snapshot in self._kept}
            require(
                block in kept,
                f"block={block} is not kept, but {', '.join(map(str, kept)) or 'none'} (see keep_blocks)",
            )
            self._set(kept[block], None)

    def fork(self, snapshot: Snapshot | None = None) -> "Session":
        """Another session that goes on from a snapshot, or from now, independently of this one."""
        other = Session(
            self._pipe,
            self._prompt,
            seed=self._seed,
            **self.size,
            blocks=self.limit,
            keep_blocks=self._kept.maxlen or 0,
            keep_place=self._keep_place,
            text_seconds=self._text_seconds,
            start=snapshot or self.snapshot(),
        )
        other._script, other.recorded_blocks = self._script, self.recorded_blocks
        return other

    def restart(self) -> int:
        """After a failure: goes on from the latest snapshot that is sound, else from the first block.

        Returns:
          The next block.
        """
        with self._turn, self._changed:
            for snapshot in sorted([*self._kept, *self._given], key=lambda s: s.block, reverse=True):
                try:
                    jax.block_until_ready(snapshot.moment.stream)
                except Exception:  # it was copied from what had failed already
                    continue
                self._set(snapshot, None)
                return snapshot.block
            self._reset(self._first(), None, ())
            return 0

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Writes what makes the frames so far again, see `load`."""
        with self._turn:
            now = self._now
        Recording(
            prompt=self._prompt,
            seed=self._seed,
            height=self.size["height"],
            width=self.size["width"],
            config=self._pipe.config,
            blocks=now.block,
            events=now.events,
            origin=self._pipe.origin,
        ).save(path)

    @classmethod
    def load(cls, path: PathLike, pipe: Pipeline | None = None, **options: Any) -> "Session":
        """Opens a session file: its blocks come again, bit for bit on the same machine and versions.

        After them the session goes on live; `replay` yields them alone.

        Args:
          path: written by `save`.
          pipe: the models, if they are loaded already; default: those of the recorded checkpoint.
          **options: further arguments of `Session`.

        Raises:
          UserError: the file is damaged, or the weights are not those recorded.
        """
        recording = Recording.read(path)
        pipe = recording.pipeline(path, pipe)
        where = {name: getattr(recording, name) for name in ("seed", "height", "width")}
        session = cls(pipe, recording.prompt, **where, **options)
        script: dict[int, list[Event]] = {}
        for event in recording.events:
            script.setdefault(event.block, []).append(event)
        session._script, session.recorded_blocks = script, recording.blocks
        return session

    def replay(self) -> Iterator[FrameBlock]:
        """Yields the recorded blocks and no more; afterwards the session can go on live."""
        self.limit, limit = self.recorded_blocks, self.limit
        try:
            yield from self
        finally:
            self.limit = limit

    # --- one turn --------------------------------------------------------------------------------

    def _dispatch(self) -> Flight:
        """Takes up what was asked for and hands the next block to the device."""
        if self._kept.maxlen:
            self._kept.append(self._copied(None, self._keep_place))
        now, requested = self._now, None
        with self._changed:
            changes, self._changes = self._changes, []
            due = [request for request in self._requests if request.at is None or request.at <= now.frame]
            self._requests = [request for request in self._requests if request not in due]
            self._changed.notify_all()
        for event in self._script.get(now.block, ()):
            if isinstance(event, SwitchEvent):
                now = turn.switched(now, event, self._pipe.encode_prompts([event.prompt])[0])
            else:
                now = turn.changed(self._pipe, now, event)
        for change in changes:
            now = turn.changed(self._pipe, now, dataclasses.replace(change, block=now.block))
        for request in due[-1:]:
            now = turn.switched(now, turn.event_of(request, now), request.text)
            requested = request.requested
        dispatched = time.perf_counter() - self._began
        self._now, flight = turn.advance(self._pipe, now, requested=requested, dispatched=dispatched)
        return flight

    def _delivered(self, flight: Flight) -> FrameBlock:
        """Waits for a block and hands it out."""
        try:
            frames = np.asarray(flight.pixels)[0]
        except Exception as error:
            with self._turn:
                raise self._failed(flight.info.block, error) from error
        self._pipe.release_text_encoder(idle_seconds=self._text_seconds)
        ready = time.perf_counter()
        timings = Timings(
            dispatched=flight.info.timings.dispatched,
            ready=ready - self._began,
            interval=None if self._last_ready is None else ready - self._last_ready,
            response=None if flight.requested is None else ready - flight.requested,
        )
        self._last_ready = ready
        return FrameBlock(flight.index, frames, dataclasses.replace(flight.info, timings=timings))

    def _is_over(self) -> bool:
        return self._is_stopped or (self.limit is not None and self._now.block >= self.limit)

    def _goes_on(self) -> bool:
        return not (self._is_over() or self._is_paused)

    # --- state -----------------------------------------------------------------------------------

    def _first(self) -> Moment:
        return turn.begin(self._pipe, self._prompt, seed=self._seed, **self.size)

    def _failed(self, block: int, error: Exception) -> SessionError:
        """Notes a failure. The state was given up to the device, so only a snapshot can go on."""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        with self._changed:
            self._flight = None
            self._failure = SessionError(
                f"block {block} failed: {reason}; `restart` goes back to the last good snapshot"
            )
            self._failure.__cause__ = error
            self._changed.notify_all()
            return self._failure

    def _copied(self, flight: Flight | None, place: Place) -> Snapshot:
        moment = dataclasses.replace(self._now, stream=turn.copied(self._now.stream, place))
        with self._changed:
            waiting = tuple(request for request in self._requests if request.at is not None)
        return Snapshot(moment, flight, waiting, place)

    def _set(self, snapshot: Snapshot, flight: Flight | None) -> None:
        moment = dataclasses.replace(snapshot.moment, stream=turn.on_device(snapshot.moment.stream))
        self._reset(moment, flight, snapshot.requests)

    def _reset(self, now: Moment, flight: Flight | None, requests: tuple[SwitchRequest, ...]) -> None:
        self._now, self._flight = now, flight
        self._requests, self._changes, self._planned = list(requests), [], now.config
        self._failure = self._last_ready = None
        while self._kept and self._kept[-1].block >= now.block:  # taken anew when the block comes
            self._kept.pop()
        self._changed.notify_all()

    def _check_open(self) -> None:
        require(not self._is_stopped, "the session has ended; start another one")

    def _check_frame(self, frame: int | None) -> None:
        self._check_open()
        now = self._now.frame
        require(
            frame is None or frame >= now,
            f"at: frame {frame} has passed; the next block begins at frame {now}",
        )
