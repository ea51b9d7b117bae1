"""A studio with drawn sessions, in this process and on a real port."""

import concurrent.futures
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession

from longlive_jax.serve import protocol, server, studio
from longlive_jax.serve.app import create_app
from longlive_jax.serve.lobby import Lobby
from longlive_jax.serve.settings import ServeConfig
from tests.serve import drawn

CONFIG = ServeConfig(pace="free", grace_seconds=1.0, warms_up=False)


@pytest.fixture(autouse=True)
def drawn_sessions(monkeypatch) -> Iterator[None]:
    """No model runs; every session has to be closed at the end."""
    monkeypatch.setattr(studio, "Session", drawn.DrawnSession)
    monkeypatch.setattr(drawn.DrawnSession, "seconds", 0.02)
    drawn.DrawnSession.failing.clear()
    drawn.DrawnSession.open.clear()
    yield
    wait_for(lambda: not drawn.DrawnSession.open)


@pytest.fixture(autouse=True)
def sockets_that_are_left(monkeypatch) -> None:
    """On leaving a socket, starlette's test client cancels the task behind it in the same breath as it says
    goodbye; the task is then done or cancelled, as it comes."""
    leave = WebSocketTestSession.__exit__

    def leaving(self: WebSocketTestSession, *error: Any) -> bool | None:
        with contextlib.suppress(concurrent.futures.CancelledError):
            return leave(self, *error)
        return None

    monkeypatch.setattr(WebSocketTestSession, "__exit__", leaving)


def wait_for(condition: Callable[[], Any], *, seconds: float = 20.0) -> Any:
    """Polls until a condition holds, and returns what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


class Browser:
    """One socket of the test client."""

    def __init__(self, socket: Any, key: str = "") -> None:
        self.socket = socket
        self.send(type="hello", key=key)
        self.welcome = self.get("welcome")

    @property
    def key(self) -> str:
        return self.welcome["key"]

    def send(self, **message: Any) -> None:
        self.socket.send_text(json.dumps(message))

    def get(self, kind: str, *, most: int = 5000, **wanted: Any) -> dict[str, Any]:
        """The next message of a kind with these values; others are skipped."""
        for _ in range(most):
            message = self.socket.receive()
            if message["type"] == "websocket.close":
                raise AssertionError(f"closed: {message}")
            if message.get("text") is not None:
                values = json.loads(message["text"])
                if values["type"] == kind and all(
                    values.get(name) == value for name, value in wanted.items()
                ):
                    return values
        raise AssertionError(f"no {kind} with {wanted}")

    def frame(self) -> tuple[dict[str, int], bytes]:
        """The next frame."""
        while (data := self.socket.receive().get("bytes")) is None:
            pass
        return protocol.unpack_frame(data)

    def open(self, prompt: str = drawn.RED, **fields: Any) -> str:
        """Opens a session and waits for its first block; returns its name."""
        self.send(type="open", prompt=prompt, **fields)
        room = self.get("room")["id"]
        self.get("block")
        return room


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(drawn.pipeline(), CONFIG), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def connect(client) -> Iterator[Callable[..., Browser]]:
    """Opens sockets that are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connecting(key: str = "", **headers: str) -> Browser:
            socket = stack.enter_context(client.websocket_connect("ws://localhost/ws", headers=headers))
            return Browser(socket, key)

        yield connecting


@dataclasses.dataclass
class Served:
    """A studio on a port."""

    address: str
    port: int
    lobby: Lobby


@contextlib.contextmanager
def served(config: ServeConfig) -> Iterator[Served]:
    """Runs a studio in a thread."""
    taken = server.bind(config)
    port = taken.getsockname()[1]
    running = server.server(drawn.pipeline(), config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    wait_for(lambda: running.started)
    try:
        yield Served(f"http://127.0.0.1:{port}", port, running.config.app.state.lobby)
    finally:
        running.should_exit = True
        thread.join(20)
        taken.close()
        assert not thread.is_alive()
