"""The thread that runs a session and shows its frames at their rate.

Frames and news go out through `emit`, in order. Requests come in through `perform`, from one other thread:
what a session takes up by itself goes straight to it, everything else waits for the end of a block.
"""

import contextlib
import dataclasses
import logging
import pathlib
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from longlive_jax import config_dict
from longlive_jax.config import PipelineConfig
from longlive_jax.errors import UserError, require
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.serve import images, knobs, protocol
from longlive_jax.serve.flow import Flow
from longlive_jax.serve.history import History
from longlive_jax.serve.kept import Keeper, Kept, Root
from longlive_jax.serve.lane import Emit, Frame, Lane, close
from longlive_jax.serve.settings import Pace, ServeConfig
from longlive_jax.serve.suggestions import suggest
from longlive_jax.serve.warming import Warming
from longlive_jax.session import FrameBlock, Recording, Session, Snapshot, turn

_LOG = logging.getLogger(__name__)
_STATS_SECONDS = 1.0
_MAX_LAG = 0.25  # seconds a late video tries to catch up
_COMPARED_BLOCKS = 4  # a comparison from the start runs so long before its prompt changes


class Studio:
    """One live video with its history."""

    def __init__(
        self,
        pipe: Pipeline,
        start: protocol.Open,
        *,
        config: ServeConfig,
        warming: Warming,
        folder: pathlib.Path,
        emit: Emit,
    ) -> None:
        """Checks the request; `start` begins.

        Raises:
          UserError: a setting does not fit.
        """
        self.flow = Flow()
        self._base, self._config, self._warming = pipe, config, warming
        self._folder, self._emit = folder, emit
        self.limits = knobs.limits(pipe.config)
        self._root = self._checked_root(Root(pipe, start.prompt, start.seed), start.settings)
        self.history = History(folder, limit_bytes=config.history_bytes)
        self._keeper = Keeper(self.history, config)
        self._live: Lane | None = None
        self._lanes: list[Lane] = []
        self._phase, self._error = "opening", ""
        self._pace: Pace = config.pace
        self._is_paused = self._is_held = self._is_closed = False
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._due = self._asked = 0.0
        self._shown: deque[float] = deque(maxlen=120)
        self._told = 0.0
        self._thread = threading.Thread(target=self._run, name="longlive-studio", daemon=True)

    # --- from other threads --------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to generate."""
        self._thread.start()

    def close(self) -> None:
        """Ends, and waits until the device is free."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self.flow.close()
        if self._thread.is_alive():
            self._thread.join()

    def hold(self, is_held: bool) -> None:
        """Stops generating while nobody watches."""
        with self._changed:
            self._is_held = is_held
            self._changed.notify_all()

    def perform(self, command: protocol.Command) -> None:
        """Does what the one in control asks for.

        Raises:
          UserError: it cannot be done; nothing has changed.
        """
        match command:
            case protocol.Switch():
                self._switch(command)
            case protocol.Change():
                self._change(command)
            case protocol.Rewind(point):
                self._at_boundary(lambda: self._rewind(point))
            case protocol.Compare():
                self._prepare_comparison(command)
            case protocol.Keep(side):
                self._at_boundary(lambda: self._end_comparison(side))
            case protocol.SetPace(pace):
                self._set(_pace=pace, _due=time.monotonic())
            case protocol.Act("pause"):
                self._set(_is_paused=True)
            case protocol.Act("resume"):
                self._set(_is_paused=False)
            case protocol.Act("restart"):
                self._at_boundary(self._restart)
            case _:
                raise UserError(f"{command} is not something a session does")

    def save(self, path: pathlib.Path) -> None:
        """Writes the session file of the live video."""
        require(self._live is not None, "the session has not begun yet")
        assert self._live is not None
        self._live.session.save(path)

    def load(self, data: bytes) -> None:
        """Goes on with an uploaded session file: its blocks come again, then the video is live.

        Raises:
          UserError: it is not such a file, or asks for more than this studio gives.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = pathlib.Path(folder) / "uploaded.session.json"
            path.write_bytes(data)
            try:
                recording = Recording.read(path)
                pipe = recording.pipeline(path, self._base)
                knobs.check_recording(recording, self._base.config)
                session = Session.load(path, pipe)
            except UserError as error:
                raise UserError(str(error).replace(str(path), "the uploaded file")) from error
            except Exception as error:  # a file can be wrong in more ways than a reader foresees
                _LOG.warning("an uploaded file was refused", exc_info=error)
                raise UserError("the uploaded file is not a session file") from error
        self._at_boundary(lambda: self._adopt(session, Root(pipe, recording.prompt, recording.seed)))

    # --- requests ------------------------------------------------------------------------------------

    def _switch(self, command: protocol.Switch) -> None:
        self._check_running()
        if command.point is not None:
            point = command.point
            self._at_boundary(lambda: self._rewind(point))
        asked = time.monotonic()
        for lane in list(self._lanes):
            policy = lane.config.switch.policy
            if not self._warming.is_ready(lane.config, policy):
                self._emit(
                    {"type": "notice", "text": f"Compiling {policy}: the prompt follows, the video goes on"}
                )
                self._warming.wait(lane.config, policy, gives_up=lambda: self._is_closed)
            blend = f"{command.blend_seconds:.3f}s" if command.blend_seconds else None
            lane.session.switch(command.prompt, blend=blend, curve=command.curve)
        self._asked = asked
        self._emit({"type": "pending", "prompt": command.prompt})

    def _change(self, command: protocol.Change) -> None:
        self._check_running()
        require(len(self._lanes) == 1, "choose a side of the comparison first")
        lane = self._lanes[0]
        knobs.check(command.settings, self._base.config)
        config = config_dict.override(lane.config, command.settings)
        turn.check_window(config)
        self._warm(config, lane.root.prompt)
        lane.session.change(command.settings, seed=command.seed)
        lane.config = config
        lane.seed = lane.seed if command.seed is None else command.seed
        self._tell_state()

    def _warm(self, config: PipelineConfig, prompt: str) -> None:
        """Compiles what a changed setting needs while the video goes on."""
        self._warming.start(config, prompt)
        if not self._warming.is_ready(config, config.switch.policy):
            self._emit({"type": "notice", "text": "Compiling the new settings, the video goes on meanwhile"})
            self._warming.wait(config, config.switch.policy, gives_up=lambda: self._is_closed)

    def _prepare_comparison(self, command: protocol.Compare) -> None:
        self._check_running()
        require(len(self._lanes) == 1, "a comparison is running; choose a side first")
        base = self._lanes[0].config if command.origin == "here" else self._lanes[0].root.pipe.config
        for settings in (command.left, command.right):
            knobs.check(settings, self._base.config)
            config = config_dict.override(base, settings)
            turn.check_window(config)
            self._warm(config, self._lanes[0].root.prompt)
        self._at_boundary(lambda: self._begin_comparison(command))

    def _check_running(self) -> None:
        require(self._phase == "running", "the video is not running; restart it first")

    def _checked_root(self, root: Root, settings: Mapping[str, Any]) -> Root:
        knobs.check(settings, self._base.config)
        config = config_dict.override(root.pipe.config, settings)
        turn.check_start(config, root.prompt, seed=root.seed, height=None, width=None)
        return dataclasses.replace(root, pipe=dataclasses.replace(root.pipe, config=config))

    # --- between two blocks --------------------------------------------------------------------------

    def _at_boundary(self, job: Callable[[], None]) -> None:
        """Runs a job in the session's thread, after the frame on the screen, and waits for it."""
        done: Future[None] = Future()
        with self._changed:
            require(not self._is_closed, "the session has ended")
            self._jobs.append((job, done))
            self._changed.notify_all()
        done.result()

    def _run_jobs(self) -> None:
        while self._jobs:
            job, done = self._jobs.popleft()
            try:
                job()
                done.set_result(None)
            except UserError as error:
                done.set_exception(error)
            except Exception as error:
                self._fail(error)
                done.set_exception(UserError("that failed; restart goes back to where it worked"))

    def _rewind(self, point: protocol.Point) -> None:
        require(point.take in self.history.takes, "that take is no longer kept")
        require(self._live is not None, "the session has not begun yet")
        assert self._live is not None
        kept = self._keeper.best(point.take, point.block)
        self._go_back(point.take, kept)

    def _go_back(self, take: int, kept: Kept | None) -> None:
        """Goes on from a kept state of a take, or from its beginning."""
        assert self._live is not None
        root = self._keeper.root_of(take, self._live.root) if kept is None else kept.root
        block = 0 if kept is None else kept.block
        session = self._session(root, None if kept is None else kept.snapshot)
        here = self.history.takes.get(take)
        if here is None or block == 0 or block != here.end:
            here = self.history.begin(take if block else None, block)
            if not block:
                self._keeper.note_root(here.number, root)
        config = root.pipe.config if kept is None else kept.snapshot.moment.config
        seed = root.seed if kept is None else kept.snapshot.moment.seed
        self._go_live(Lane(session, root, here, config, seed))

    def _restart(self) -> None:
        require(self._phase == "failed", "the video is running; there is nothing to restart")
        if self._live is None:
            self._begin()
            return
        take = self._live.take.number
        kept = self._keeper.latest_sound(take)
        if kept is None and self.history.end(take) == 0:
            self._close_lanes()
            self._live = None
            self._begin()
            return
        self._go_back(take, kept)

    def _adopt(self, session: Session, root: Root) -> None:
        take = self.history.begin(None, 0, label="Session file")
        self._keeper.note_root(take.number, root)
        self._go_live(Lane(session, root, take, root.pipe.config, root.seed))

    def _begin_comparison(self, command: protocol.Compare) -> None:
        live = self._live
        assert live is not None
        sides = (command.left, command.right)
        lanes: list[Lane] = []
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: close(lanes))
            snapshot = live.session.snapshot() if command.origin == "here" else None
            for channel, settings in zip((1, 2), sides, strict=True):
                if snapshot is not None:
                    session = self._session(live.root, snapshot)
                    lane = Lane(session, live.root, live.take, live.config, live.seed, channel)  # type: ignore[arg-type]
                    lanes.append(lane)
                    if settings:
                        session.change(settings)
                        lane.config = config_dict.override(lane.config, settings)
                else:
                    root = self._checked_root(live.root, settings)
                    session = self._session(root, None)
                    lane = Lane(session, root, live.take, root.pipe.config, root.seed, channel)  # type: ignore[arg-type]
                    lanes.append(lane)
                if command.prompt:
                    at = None if snapshot else _COMPARED_BLOCKS * lane.config.window.block_frames
                    session.switch(command.prompt, at=at)
            undo.pop_all()
        start = self.history.end(live.take.number) if snapshot else 0
        for lane, settings in zip(lanes, sides, strict=True):
            parent = live.take.number if snapshot and start else None
            lane.take = self.history.begin(parent, start, label=knobs.describe(settings, other=sides))
            self._keeper.note_root(lane.take.number, lane.root)
        self._lanes = lanes
        self.history.in_use = {live.take.number, *(lane.take.number for lane in lanes)}
        self._asked = time.monotonic() if command.prompt and snapshot else 0.0
        self._resume_clock()
        self._tell_state()

    def _end_comparison(self, side: protocol.Side) -> None:
        require(len(self._lanes) == 2, "no comparison is running")
        assert self._live is not None
        chosen = {"left": self._lanes[0], "right": self._lanes[1], "neither": self._live}[side]
        self._go_live(chosen)

    def _go_live(self, live: Lane) -> None:
        """Puts a lane on the screen as the live one, and lets go of all others."""
        live.channel = 0
        for lane in {id(lane): lane for lane in [*self._lanes, self._live] if lane is not None}.values():
            if lane is not live:
                lane.session.close()
        self._live, self._lanes = live, [live]
        self.history.in_use = {live.take.number}
        self._phase, self._error = "running", ""
        self._warming.start(live.config, live.root.prompt)
        self._resume_clock()
        self._tell_state()

    def _session(self, root: Root, snapshot: Snapshot | None) -> Session:
        return Session(root.pipe, root.prompt, seed=root.seed, start=snapshot)

    # --- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._begin()
        except Exception as error:
            self._fail(error)
        while not self._is_closed:
            self._run_jobs()
            with self._changed:
                if self._waits():
                    self._changed.wait_for(lambda: self._is_closed or self._jobs or not self._waits())
                    self._resume_clock()
                    continue
            try:
                self._show([(lane, next(lane.session)) for lane in self._lanes])
            except Exception as error:
                self._fail(error)
        for _, done in self._jobs:
            done.set_exception(UserError("the session has ended"))
        self._close_lanes()
        self._keeper.clear()

    def _begin(self) -> None:
        self._phase, self._error = "opening", ""
        self._tell_state()
        session = self._session(self._root, None)
        take = self.history.begin(None, 0)
        self._keeper.note_root(take.number, self._root)
        self._go_live(Lane(session, self._root, take, self._root.pipe.config, self._root.seed))

    def _waits(self) -> bool:
        return self._phase != "running" or self._is_paused or self._is_held

    def _show(self, blocks: Sequence[tuple[Lane, FrameBlock]]) -> None:
        """Shows a block of each lane, frame by frame, and keeps it."""
        lane, block = blocks[0]
        is_switched = block.info.timings.response is not None
        encoded: list[list[bytes]] = [[] for _ in blocks]
        is_on = True
        for offset in range(len(block.frames)):
            for kept, (_, other) in zip(encoded, blocks, strict=True):
                kept.append(images.encode(other.frames[offset]))
            is_on = is_on and self._wait_turn()
            if not is_on:
                continue
            if offset == 0:
                self._tell_block(blocks, is_switched=is_switched)
            self._show_frame(blocks, encoded, offset)
        for kept, (owner, other) in zip(encoded, blocks, strict=True):
            info = other.info
            self.history.note(owner.take, info.block, info.prompt, info.policy)
            self.history.store(owner.take, info.block, images.thumbnail(other.frames[0]), kept)
            self._emit({"type": "stored", "take": owner.take.number, "block": info.block,
                        "prompt": info.prompt, "policy": info.policy})  # fmt: skip
        if lane is self._live and self._phase == "running":
            self._keeper.offer(lane.take.number, lane.root, lane.session, is_switch=is_switched)

    def _show_frame(
        self, blocks: Sequence[tuple[Lane, FrameBlock]], encoded: Sequence[Sequence[bytes]], offset: int
    ) -> None:
        now = time.monotonic()
        for images_of, (lane, block) in zip(encoded, blocks, strict=True):
            self.flow.publish()
            self._emit(Frame(protocol.pack_frame(
                images_of[offset], channel=lane.channel, take=lane.take.number, block=block.info.block,
                index=block.first + offset, sent=now,
            )))  # fmt: skip
        self._shown.append(now)
        if now - self._told >= _STATS_SECONDS:
            self._told = now
            recent = [at for at in self._shown if at > now - 2]
            rate = (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0
            self._emit({"type": "stats", "fps": round(rate, 2), "kept": self._keeper.points()})

    def _wait_turn(self) -> bool:
        """Waits until the next frame is due; False if what is left of the block will not be shown."""
        with self._changed:
            while True:
                if self._is_closed or self._jobs:
                    return False
                if self._is_paused or self._is_held:
                    self._changed.wait()
                    self._resume_clock()
                    continue
                delay = self._due - time.monotonic() if self._pace == "real" else 0.0
                if delay > 0:
                    self._changed.wait(delay)
                elif not self.flow.has_room():
                    self._changed.wait(0.005)
                else:
                    break
            fps = self._base.config.video.fps
            self._due = max(self._due + 1 / fps, time.monotonic() - _MAX_LAG)
            return True

    def _resume_clock(self) -> None:
        self._due = time.monotonic()

    def _set(self, **values: Any) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._changed.notify_all()
        self._tell_state()

    def _fail(self, error: Exception) -> None:
        _LOG.exception("the session failed", exc_info=error)
        self._phase = "failed"
        self._error = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._tell_state()

    def _close_lanes(self) -> None:
        close([*self._lanes, *([self._live] if self._live else [])])
        self._lanes = []

    # --- news ----------------------------------------------------------------------------------------

    def _tell_block(self, blocks: Sequence[tuple[Lane, FrameBlock]], *, is_switched: bool) -> None:
        lane, (first, _, info) = blocks[0]
        response = None
        if is_switched and self._asked:
            response, self._asked = time.monotonic() - self._asked, 0.0
        self._emit({
            "type": "block", "take": lane.take.number, "block": info.block, "first": first,
            "prompt": info.prompt, "policy": info.policy, "weight": round(info.weight, 3), "seed": info.seed,
            "switched": is_switched, "response": response,
            "suggestions": suggest(self._base.config, info.prompt) if is_switched or first == 0 else None,
        })  # fmt: skip

    def _tell_state(self) -> None:
        """All that a page needs besides the frames."""
        lane = self._lanes[0] if self._lanes else None
        compared = None
        if len(self._lanes) == 2:
            compared = [
                {"label": lane.take.label, "take": lane.take.number, **knobs.shown(lane.config)}
                for lane in self._lanes
            ]
        shown = self._live or lane
        self._emit({
            "type": "state", "phase": self._phase, "error": self._error, "paused": self._is_paused,
            "pace": self._pace, "compare": compared,
            "settings": knobs.shown(shown.config if shown else self._root.pipe.config),
            "seed": shown.seed if shown else self._root.seed,
            "takes": self.history.shown(),
            "current": shown.take.number if shown else None,
            "oldest": list(self.history.oldest().items()), "kept": self._keeper.points(),
        })  # fmt: skip
