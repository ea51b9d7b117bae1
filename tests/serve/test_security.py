"""Nobody but this page talks to the studio."""

import re

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from longlive_jax.errors import UserError
from longlive_jax.serve import server
from longlive_jax.serve.app import STATIC, create_app
from longlive_jax.serve.settings import UPLOAD_BYTES, ServeConfig, new_token
from tests.serve import drawn
from tests.serve.conftest import Browser

TOKEN = "0123456789abcdef"


@pytest.fixture
def guarded():
    config = ServeConfig(host="0.0.0.0", token=TOKEN, allowed_hosts=("studio.example.org",), warms_up=False)
    app = create_app(drawn.pipeline(), config)
    with TestClient(app, base_url="http://192.0.2.7:8765", follow_redirects=False) as client:
        yield client


def test_a_rebound_name_is_refused(client):
    """A page of evil.example whose name points to 127.0.0.1 would be same-origin; its Host gives it away."""
    for host in (
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "192.0.2.7",
        "",
        "[",
        "a@localhost.x",
    ):
        answer = client.get("/", headers={"host": host})
        assert answer.status_code == 421, host
    for host in ("localhost", "LOCALHOST:8765", "127.0.0.1:8765", "[::1]:8765"):
        assert client.get("/", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "file://localhost", "["]
)
def test_other_origins_are_refused(client, connect, origin):
    assert client.get("/api/status", headers={"origin": origin}).status_code == 403
    assert client.post("/api/rooms/x/session", headers={"origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect):
        connect(origin=origin)


def test_the_own_origin_is_taken(client, connect):
    assert client.get("/api/status", headers={"origin": "http://localhost"}).status_code == 200
    assert connect(origin="http://localhost").key


def test_what_another_site_embeds_is_refused(client):
    for site in ("cross-site", "same-site"):
        headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
        assert client.get("/api/status", headers=headers).status_code == 403
        assert client.get("/", headers=headers | {"sec-fetch-mode": "navigate"}).status_code == 200
        assert client.post("/login", headers=headers | {"sec-fetch-mode": "navigate"}).status_code == 403


def test_every_answer_forbids_framing_and_foreign_resources(client):
    for path in ("/", "/static/app.js", "/api/status", "/nowhere"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_elsewhere():
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|url\(|@import|//cdn", text), path.name
    assert {path.suffix for path in STATIC.iterdir()} == {".html", ".css", ".js", ".svg"}
    assert " style=" not in (STATIC / "index.html").read_text()  # the policy would ignore it


# --- the token --------------------------------------------------------------------------------------


def test_without_the_token_there_is_only_the_door(guarded):
    answer = guarded.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert guarded.get("/login").status_code == 200
    for path in ("/api/status", "/static/app.js", "/api/rooms/x/video.mp4", "/?token=wrong"):
        assert guarded.get(path).status_code in (303, 401), path
    with pytest.raises(WebSocketDisconnect), guarded.websocket_connect("ws://192.0.2.7:8765/ws"):
        pass


def test_the_link_with_the_token_opens(guarded):
    answer = guarded.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert guarded.get("/").status_code == 200
    with guarded.websocket_connect("ws://192.0.2.7:8765/ws") as socket:
        assert Browser(socket).key


def test_the_door_takes_the_token(guarded, monkeypatch):
    assert guarded.post("/login", content="token=wrong").status_code == 401
    assert guarded.post("/login", content="token=" + "x" * 5000).status_code == 413
    assert guarded.post("/login", content=f"token={TOKEN}").status_code == 303
    assert guarded.get("/api/status").status_code == 200


def test_a_script_may_send_it_as_a_header(guarded):
    assert guarded.get("/api/status", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_names_of_a_public_server(guarded):
    headers = {"authorization": f"Bearer {TOKEN}"}
    for host, status in (("studio.example.org", 200), ("192.0.2.9:1", 200), ("evil.example", 421)):
        assert guarded.get("/api/status", headers=headers | {"host": host}).status_code == status, host


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"host": "0.0.0.0"}, "give a token"),
        ({"host": "192.0.2.1"}, "give a token"),
        ({"host": "example.org"}, "give a token"),
        ({"token": "short"}, "token has 5 characters"),
        ({"sessions": 0}, "sessions=0 must be positive"),
        ({"port": 1 << 16}, "port=65536"),
    ],
)
def test_settings_that_are_not_safe_are_refused(given, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        ServeConfig(**given)


def test_a_made_token_is_long_and_new():
    assert len(new_token()) >= 32
    assert new_token() != new_token()


def test_a_port_that_is_taken_is_refused():
    config = ServeConfig(port=0)
    with server.bind(config) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(UserError, match=f"port={port} cannot be listened on"):
            server.bind(ServeConfig(port=port))


# --- bounds -----------------------------------------------------------------------------------------


def test_uploads_are_bounded_and_only_the_controllers(client, connect):
    browser = connect()
    room = browser.open()
    path, own = f"/api/rooms/{room}/session", {"x-longlive-key": browser.key}
    assert client.post(path, content=b"{}").status_code == 403
    assert client.post(path, content=b"{}", headers={"x-longlive-key": connect().key}).status_code == 403
    assert client.post(path, content=b"x" * (UPLOAD_BYTES + 1), headers=own).status_code == 413
    answer = client.post(path, content=b"{}", headers=own)
    assert answer.status_code == 422
    assert "the uploaded file" in answer.text
    assert "/" not in answer.text.replace("session=the", "")
    browser.get("block")  # it goes on


def test_paths_do_not_lead_out(client, connect):
    room = connect().open()
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        f"/api/rooms/{room}/block/0/-1",
        "/api/rooms/x/block/0/0",
    ):
        assert client.get(path).status_code in (404, 405), path
