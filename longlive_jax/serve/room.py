"""A session and the browsers around it: who is in control, and what each of them is sent.

Everything here runs in the event loop.
"""

import asyncio
import collections
import json
import logging
import pathlib
import secrets
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from longlive_jax.errors import UserError
from longlive_jax.serve import protocol
from longlive_jax.serve.flow import CONTROLLER_FRAMES
from longlive_jax.serve.lane import Frame
from longlive_jax.serve.studio import Studio

_LOG = logging.getLogger(__name__)
_VIEWER_FRAMES = 4  # of a slow viewer; older ones are dropped
_MAX_TEXTS = 400  # a browser that lets more lie is not reading
_MAX_COMMANDS = 16
_AT_ONCE = (protocol.Act("pause"), protocol.Act("resume"))  # they do not wait behind what compiles
TRY_AGAIN, REPLACED = 1013, 4001
"""Why a socket is closed: too much waits for it, or the same browser has another one."""


class Outbox:
    """What waits for one browser's socket. Frames of a slow viewer are dropped, messages never.

    Attributes:
      dropped: frames that were.
      close_code: set when the socket should be closed: the browser does not read, or came back elsewhere.
    """

    def __init__(self) -> None:
        self.frame_limit = _VIEWER_FRAMES
        self.dropped = 0
        self.close_code: int | None = None
        self._items: collections.deque[str | bytes] = collections.deque()
        self._frames = 0
        self._ready = asyncio.Event()
        self.on_progress: Callable[[], None] = lambda: None

    @property
    def frames(self) -> int:
        """How many frames wait."""
        return self._frames

    def put(self, message: str) -> None:
        """Adds a text message."""
        if len(self._items) - self._frames >= _MAX_TEXTS:
            self.close(TRY_AGAIN)
        else:
            self._items.append(message)
        self._ready.set()

    def close(self, code: int) -> None:
        """Ends the connection without sending what waits."""
        self.close_code = code
        self._ready.set()

    def put_frame(self, frame: bytes) -> None:
        """Adds a frame; the oldest one goes where there are too many."""
        while self._frames >= self.frame_limit:
            self._items.remove(next(item for item in self._items if isinstance(item, bytes)))
            self._frames -= 1
            self.dropped += 1
        self._items.append(frame)
        self._frames += 1
        self._ready.set()

    def drop_frames(self) -> None:
        """Forgets all frames: another video comes."""
        self._items = collections.deque(item for item in self._items if isinstance(item, str))
        self._frames = 0

    async def get(self) -> str | bytes | None:
        """The next message; None when the socket should be closed."""
        while not self._items or self.close_code is not None:
            if self.close_code is not None:
                return None
            self._ready.clear()
            await self._ready.wait()
        item = self._items.popleft()
        self._frames -= isinstance(item, bytes)
        self.on_progress()
        return item


class Client:
    """A browser.

    Attributes:
      key: what it presents to be taken for the same one after its connection dropped.
      name: what others see.
      outbox: of its connection, or None.
      left: when the connection dropped (`time.monotonic`).
      room: what it watches.
      wish: the session it waits for.
    """

    def __init__(self, number: int) -> None:
        self.key, self.name = secrets.token_urlsafe(18), f"Guest {number}"
        self.outbox: Outbox | None = None
        self.left = time.monotonic()
        self.room: Room | None = None
        self.wish: protocol.Open | None = None

    def tell(self, **message: Any) -> None:
        """Sends a message, if there is a connection."""
        if self.outbox is not None:
            self.outbox.put(json.dumps(message, separators=(",", ":")))


class Room:
    """One session with its audience.

    Attributes:
      id: in the address of the page, hard to guess.
      studio: the session.
      clients: in the order they came.
      controller: who may change the video.
      used: when the controller last asked for something (`time.monotonic`).
      exports: held while a file is made for download.
      prompt: the latest one.
      folder: of the session's files.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.id = secrets.token_urlsafe(9)
        self.studio: Studio
        self.clients: list[Client] = []
        self.controller: Client | None = None
        self.used = self.opened = time.monotonic()
        self.exports = asyncio.Lock()
        self.prompt = ""
        self.is_closed = False
        self._folder = folder
        self._asking: list[Client] = []
        self._loop = asyncio.get_running_loop()
        self._state: dict[str, Any] = {}
        self._latest: dict[str, Any] = {}
        self._frame: bytes | None = None
        self._pending = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="longlive-requests")

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self._folder.name)

    # --- people --------------------------------------------------------------------------------------

    def join(self, client: Client) -> None:
        """Lets a browser in, or in again after a dropped connection."""
        if client not in self.clients:
            self.clients.append(client)
            client.room = self
        if self.controller is None:
            self.controller = client
        if client.outbox is not None:
            client.outbox.on_progress = self._progress(client)
        client.tell(type="room", id=self.id, limits=self.studio.limits, state=self._state, block=self._latest)
        if self._frame is not None and client.outbox is not None:
            client.outbox.put_frame(self._frame)
        self.tell_presence()

    def leave(self, client: Client) -> None:
        """A browser is gone for good; control passes on."""
        self.clients.remove(client)
        client.room = None
        if client in self._asking:
            self._asking.remove(client)
        if client is self.controller:
            self.controller = None
            self._pass_on()
        self.tell_presence()

    def claim(self, client: Client) -> None:
        """Takes control if it is free, else asks for it."""
        if self.controller is None:
            self.controller = client
        elif client is not self.controller and client not in self._asking:
            self._asking.append(client)
        self.tell_presence()

    def release(self, client: Client) -> None:
        """Gives control to whoever asked first, or came first."""
        if client is self.controller:
            self._pass_on(besides=client)
            self.tell_presence()

    def connected(self) -> list[Client]:
        """Those with a connection."""
        return [client for client in self.clients if client.outbox is not None]

    def tell_presence(self) -> None:
        """Tells everyone who is there, and adapts to it."""
        here = self.connected()
        for client in here:
            assert client.outbox is not None
            is_controller = client is self.controller
            # Generation waits for the controller well before that many of its frames wait.
            client.outbox.frame_limit = 4 * CONTROLLER_FRAMES if is_controller else _VIEWER_FRAMES
            client.tell(
                type="presence",
                role="control" if is_controller else "watch",
                name=client.name,
                viewers=len(here),
                controller=self.controller.name if self.controller else None,
                asking=[other.name for other in self._asking],
                asked=client in self._asking,
            )
        self.studio.hold(not here)
        self._report()

    def _pass_on(self, *, besides: Client | None = None) -> None:
        others = [c for c in [*self._asking, *self.connected(), *self.clients] if c is not besides]
        if others:
            self.controller = others[0]
            self.used = time.monotonic()
            if self.controller in self._asking:
                self._asking.remove(self.controller)

    def _progress(self, client: Client) -> Callable[[], None]:
        def progressed() -> None:
            if client is self.controller:
                self._report()

        return progressed

    def _report(self, accepted: int = 0) -> None:
        outbox = self.controller.outbox if self.controller else None
        self.studio.flow.report(accepted=accepted, backlog=outbox.frames if outbox else 0)

    # --- from the studio -----------------------------------------------------------------------------

    def emit(self, event: dict[str, Any] | Frame) -> None:
        """Takes an event from the studio's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, event)
        except RuntimeError:  # the loop is closed: the process ends
            self.studio.flow.close()

    def _take(self, event: dict[str, Any] | Frame) -> None:
        if isinstance(event, Frame):
            self._frame = event.data
            for client in self.connected():
                assert client.outbox is not None
                client.outbox.put_frame(event.data)
            self._report(accepted=1)
            return
        self._remember(event)
        message = json.dumps(event, separators=(",", ":"))
        for client in self.connected():
            assert client.outbox is not None
            client.outbox.put(message)

    def _remember(self, event: dict[str, Any]) -> None:
        """Keeps what a browser that comes later has to know."""
        if event["type"] == "state":
            if event.get("current") != self._state.get("current"):
                for client in self.connected():
                    assert client.outbox is not None
                    client.outbox.drop_frames()
                self._report()
            self._state = event
        elif event["type"] == "block":
            # Suggestions come only with a new prompt, but a browser that joins wants them too.
            kept = event["suggestions"] or self._latest.get("suggestions")
            self._latest = {**event, "suggestions": kept, "response": None}
            self.prompt = event["prompt"]
        elif event["type"] == "stored":
            self._extend(event)
        elif event["type"] == "stats":
            self._state["kept"] = event["kept"]

    def _extend(self, event: dict[str, Any]) -> None:
        for take in self._state.get("takes", ()):
            if take["id"] == event["take"]:
                take["end"] = event["block"] + 1
                history = self.studio.history.takes.get(event["take"])
                if history is not None:
                    take["spans"] = history.shown()["spans"]

    # --- to the studio -------------------------------------------------------------------------------

    async def perform(self, client: Client, command: protocol.Command) -> None:
        """Does what the controller asks for; what is wrong with it is told to them alone."""
        if client is not self.controller:
            client.tell(type="error", text="somebody else is in control; ask for it first")
            return
        self.used = time.monotonic()
        if isinstance(command, protocol.SetPace) or command in _AT_ONCE:
            self.studio.perform(command)
            return
        if self._pending >= _MAX_COMMANDS:
            client.tell(type="error", text="too many requests wait; try again in a moment")
            return
        self._pending += 1
        try:
            await self.run(self.studio.perform, command)
        except UserError as error:
            client.tell(type="error", text=str(error))
        except Exception as error:
            _LOG.exception("a request failed: %s", command, exc_info=error)
            client.tell(type="error", text=f"that failed: {type(error).__name__}; the video goes on")
        finally:
            self._pending -= 1

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs something that may take time, one after the other."""
        return await self._loop.run_in_executor(self._worker, function, *arguments)

    async def close(self, reason: str) -> None:
        """Ends the session and tells everyone."""
        if self.is_closed:
            return
        self.is_closed = True
        for client in self.clients:
            client.room = None
            if client.outbox is not None:
                client.outbox.drop_frames()
                client.outbox.on_progress = lambda: None
            client.tell(type="closed", reason=reason)
        self.clients.clear()
        await self._loop.run_in_executor(None, self.studio.close)
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._folder.cleanup()
