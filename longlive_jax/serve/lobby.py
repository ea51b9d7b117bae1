"""Who gets a session: a limited number of rooms, a queue, and places kept for dropped connections."""

import asyncio
import contextlib
import logging
import pathlib
import tempfile
import time
from typing import Any

from longlive_jax.errors import UserError, require
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.serve import knobs, protocol
from longlive_jax.serve.room import REPLACED, Client, Outbox, Room
from longlive_jax.serve.settings import ServeConfig
from longlive_jax.serve.studio import Studio
from longlive_jax.serve.suggestions import is_toy, suggest
from longlive_jax.serve.warming import Warming

_LOG = logging.getLogger(__name__)
_TICK_SECONDS = 0.5
_MAX_ABSENT = 256  # browsers remembered without a connection


class Lobby:
    """All browsers and all rooms of one server; runs in its event loop."""

    def __init__(self, pipe: Pipeline, config: ServeConfig) -> None:
        self.rooms: dict[str, Room] = {}
        self._pipe, self._config = pipe, config
        self._clients: dict[str, Client] = {}
        self._queue: list[Client] = []
        self._warming = Warming(pipe, is_on=config.warms_up)
        self._numbers = 0
        self._closing: set[asyncio.Task[None]] = set()

    # --- connections ---------------------------------------------------------------------------------

    def connect(self, outbox: Outbox, key: str) -> Client:
        """A socket says hello; with the key of a browser it is taken for that one.

        Raises:
          UserError: there are too many.
        """
        connected = [client for client in self._clients.values() if client.outbox is not None]
        client = self._clients.get(key)
        if client is None:
            require(len(connected) < self._config.sockets, "the studio is full; try again later")
            self._numbers += 1
            client = Client(self._numbers)
            self._clients[client.key] = client
            self._forget_absent()
        elif client.outbox is not None:
            client.outbox.close(REPLACED)  # it has not noticed yet that it is dead, or is another tab's
        client.outbox = outbox
        video = self._pipe.config.video
        client.tell(
            type="welcome",
            key=client.key,
            name=client.name,
            grace=self._config.grace_seconds,
            model={
                "name": self._pipe.config.name,
                "width": video.width,
                "height": video.height,
                "fps": video.fps,
                "toy": is_toy(self._pipe.config),
            },
            settings=knobs.shown(self._pipe.config),
            limits=knobs.limits(self._pipe.config),
            suggestions=suggest(self._pipe.config, ""),
        )
        if client.room is not None:
            client.room.join(client)
        else:
            self._tell_lobby()
        return client

    def disconnect(self, client: Client, outbox: Outbox) -> None:
        """A socket is gone; the browser may come back."""
        if client.outbox is not outbox:
            return  # it has come back already
        client.outbox, client.left = None, time.monotonic()
        if client.room is not None:
            client.room.tell_presence()

    # --- messages ------------------------------------------------------------------------------------

    async def take(self, client: Client, message: protocol.FromBrowser) -> None:
        """Does what a browser asks for.

        Raises:
          UserError: it cannot be done.
        """
        match message:
            case protocol.Ping(t):
                client.tell(type="pong", t=t)
            case protocol.Open():
                self._open(client, message)
            case protocol.Watch(name):
                room = self.rooms.get(name)
                require(room is not None, "that session has ended")
                assert room is not None
                self._withdraw(client)
                if client.room is not room:
                    self._leave(client)
                room.join(client)
            case protocol.Act("cancel"):
                self._withdraw(client)
                self._tell_lobby()
            case protocol.Act("leave"):
                self._leave(client)
                self._tell_lobby()
            case protocol.Hello():
                raise UserError("hello was said before")
            case _:
                await self._in_room(client, message)

    async def _in_room(self, client: Client, message: Any) -> None:
        room = client.room
        if room is None:
            raise UserError("open or watch a session first")
        match message:
            case protocol.Act("claim"):
                room.claim(client)
            case protocol.Act("release"):
                room.release(client)
            case protocol.Act("end"):
                require(client is room.controller, "somebody else is in control; ask for it first")
                self._close(room, "the session was ended")
            case _:
                await room.perform(client, message)

    def _open(self, client: Client, wish: protocol.Open) -> None:
        require(client.room is None, "leave this session before you open another one")
        require(
            client in self._queue or len(self._queue) < self._config.waiting,
            "too many wait for a session already; watch one, or try again later",
        )
        client.wish = wish
        if client not in self._queue:
            self._queue.append(client)
        self._serve_queue()
        self._tell_lobby()

    def _serve_queue(self) -> None:
        """Opens sessions for those who wait, while there is room and they are there."""
        while len(self.rooms) + len(self._closing) < self._config.sessions:
            here = [client for client in self._queue if client.outbox is not None]
            if not here:
                return
            client = here[0]
            self._queue.remove(client)
            wish, client.wish = client.wish, None
            assert wish is not None
            try:
                self._open_room(client, wish)
            except UserError as error:
                client.tell(type="error", text=str(error))

    def _open_room(self, client: Client, wish: protocol.Open) -> None:
        with contextlib.ExitStack() as undo:
            folder = tempfile.TemporaryDirectory(prefix="longlive-studio-")
            undo.callback(folder.cleanup)
            room = Room(folder)
            room.studio = Studio(
                self._pipe,
                wish,
                config=self._config,
                warming=self._warming,
                folder=pathlib.Path(folder.name),
                emit=room.emit,
            )
            undo.pop_all()
        room.prompt = wish.prompt
        self.rooms[room.id] = room
        room.join(client)
        room.studio.start()

    def _leave(self, client: Client) -> None:
        room = client.room
        if room is None:
            return
        room.leave(client)
        if not room.clients:
            self._close(room, "nobody was left")

    def _withdraw(self, client: Client) -> None:
        client.wish = None
        if client in self._queue:
            self._queue.remove(client)

    def _close(self, room: Room, reason: str) -> None:
        """Ends a session; its place is free when its thread is through."""
        if self.rooms.pop(room.id, None) is None:
            return

        async def closing() -> None:
            try:
                await room.close(reason)
            except Exception as error:
                _LOG.exception("closing a session failed", exc_info=error)

        task = asyncio.get_running_loop().create_task(closing())
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        self._serve_queue()
        self._tell_lobby()

    # --- time ----------------------------------------------------------------------------------------

    async def keep_house(self) -> None:
        """Runs as long as the server: lets those go who do not come back."""
        try:
            while True:
                await asyncio.sleep(_TICK_SECONDS)
                try:
                    self._tick(time.monotonic())
                except Exception as error:
                    _LOG.exception("keeping house failed", exc_info=error)
        finally:
            for room in list(self.rooms.values()):
                self._close(room, "the studio closes")
            if self._closing:
                await asyncio.wait(set(self._closing))

    def _tick(self, now: float) -> None:
        for client in list(self._clients.values()):
            if client.outbox is None and now - client.left > self._config.grace_seconds:
                self._withdraw(client)
                self._leave(client)
                del self._clients[client.key]
        if any(client.outbox is not None for client in self._queue):
            for room in list(self.rooms.values()):
                if now - room.used > self._config.idle_seconds:
                    self._close(room, "nobody asked for anything, and others wait")

    def _forget_absent(self) -> None:
        absent = [client for client in self._clients.values() if client.outbox is None]
        for client in sorted(absent, key=lambda client: client.left)[: max(len(absent) - _MAX_ABSENT, 0)]:
            client.left = -float("inf")

    # --- news ----------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """How much goes on."""
        return {
            "sessions": len(self.rooms) + len(self._closing),
            "sockets": sum(client.outbox is not None for client in self._clients.values()),
            "waiting": len(self._queue),
        }

    def client(self, key: str) -> Client | None:
        """The browser with a key."""
        return self._clients.get(key)

    def _tell_lobby(self) -> None:
        """Tells everyone without a session what there is."""
        rooms = [
            {"id": room.id, "prompt": room.prompt, "viewers": len(room.connected())}
            for room in self.rooms.values()
        ]
        for client in self._clients.values():
            if client.room is None:
                place = self._queue.index(client) + 1 if client in self._queue else None
                client.tell(
                    type="lobby",
                    rooms=rooms,
                    sessions=self._config.sessions,
                    free=max(self._config.sessions - len(self.rooms) - len(self._closing), 0),
                    place=place,
                    waiting=len(self._queue),
                )
