"""A studio with drawn sessions, in this process and on a real port."""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession

from longlive_jax.serve import protocol, server, studio
from longlive_jax.serve.app import create_app
from longlive_jax.serve.lobby import Lobby
from longlive_jax.serve.settings import ServeConfig
from tests.serve import drawn
from tests.serve.page import Page, wait_for

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


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def start_browser(downloads):
    """Starts browsers that are closed at the end."""
    from selenium import webdriver

    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    assert chromium, "these tests drive Chromium; apt-get install chromium chromium-driver"
    assert driver, "these tests drive Chromium; apt-get install chromium-driver"
    started = []

    def start(width: int = 1366, height: int = 900, *, is_phone: bool = False) -> Page:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--window-size={width},{height}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        if is_phone:
            metrics = {"width": width, "height": height, "pixelRatio": 2}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        page = Page(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))
        started.append(page)
        return page

    yield start
    for page in started:
        page.driver.quit()


@pytest.fixture(scope="module")
def browser(start_browser) -> Page:
    return start_browser()


@pytest.fixture
def page(browser):
    """The browser; the page must not have complained."""
    browser.driver.get_log("browser")
    yield browser
    expected = ("WebSocket", "status of 401", "ERR_CONNECTION_REFUSED")  # studios come and go here
    log = browser.driver.get_log("browser")
    complaints = [
        e for e in log if e["level"] == "SEVERE" and not any(word in e["message"] for word in expected)
    ]
    browser.go("about:blank")
    assert not complaints
