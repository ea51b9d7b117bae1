"""Sessions and the browsers around them: control, queue, grace, history, and what goes wrong."""

import asyncio
import dataclasses
import io
import json
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from longlive_jax.serve import images, lobby
from longlive_jax.serve.app import create_app
from longlive_jax.serve.flow import Flow
from longlive_jax.serve.history import split
from longlive_jax.serve.room import TRY_AGAIN, Outbox
from longlive_jax.video import read_video
from tests.serve import drawn
from tests.serve.conftest import CONFIG, Browser
from tests.serve.drawn import BLUE, GREEN, RED, DrawnSession
from tests.serve.page import wait_for


def colours(frames) -> list[str]:
    return [drawn.colour_of(images.decode(image)) for _, image in frames]


def state_with(browser: Browser, **wanted) -> dict:
    return browser.get("state", **wanted)


# --- the video --------------------------------------------------------------------------------------


def test_frames_come_one_after_the_other_and_follow_the_prompt(connect):
    browser = connect()
    browser.open(RED)
    frames = [browser.frame() for _ in range(20)]
    first = frames[0][0]["index"]
    assert [header["index"] for header, _ in frames] == list(range(first, first + 20))
    assert set(colours(frames[::5])) == {"red"}
    browser.send(type="switch", prompt=BLUE)
    assert browser.get("pending")["prompt"] == BLUE
    block = browser.get("block", prompt=BLUE)
    assert block["switched"]
    assert block["policy"] == "recache"
    assert 0 < block["response"] < 10
    assert BLUE not in block["suggestions"]
    assert len(block["suggestions"]) == 4
    header, image = browser.frame()
    assert header["block"] == block["block"]
    assert drawn.colour_of(images.decode(image)) == "blue"


def test_the_real_pace_is_the_video_s(connect):
    browser = connect()
    browser.open(RED)
    browser.send(type="pace", pace="real")
    state_with(browser, pace="real")
    browser.frame()
    start = time.monotonic()
    for _ in range(16):
        browser.frame()
    assert time.monotonic() - start > 0.6  # a second, less what may have waited


def test_pause_holds_the_picture(connect):
    browser = connect()
    browser.open()
    browser.send(type="pause")
    state_with(browser, paused=True)
    time.sleep(0.2)
    browser.send(type="ping", t=1)
    browser.get("pong", t=1)
    browser.send(type="ping", t=2)
    message = json.loads(browser.socket.receive()["text"])
    assert message["type"] == "pong", "a frame came while the video was paused"
    browser.send(type="resume")
    browser.frame()


def test_knobs_turn_and_refusals_change_nothing(connect):
    browser = connect()
    browser.open()
    browser.send(type="change", settings={"policy": "flush", "window": 9}, seed=7)
    state = state_with(browser, seed=7)
    assert (state["settings"]["policy"], state["settings"]["window"]) == ("flush", 9)
    for settings, reason in (
        ({"window": 25}, "at most 24 frames"),
        ({"window": 3}, "at least sink_frames + block_frames"),
        ({"sink": 6}, "the sink cannot grow"),
        ({"steps": [500, 1000]}, "must fall strictly"),
    ):
        browser.send(type="change", settings=settings)
        assert reason in browser.get("error")["text"]
    browser.send(type="switch", prompt=BLUE)
    assert browser.get("block", prompt=BLUE)["policy"] == "flush"


# --- history ----------------------------------------------------------------------------------------


def test_rewinding_branches_and_keeps_both_takes(client, connect):
    browser = connect()
    room = browser.open(RED)
    browser.get("stored", block=9)
    browser.send(type="switch", prompt=GREEN, take=0, block=7)
    state = state_with(browser, current=1)
    take = state["takes"][1]
    assert take["parent"] == 0
    assert take["start"] in (6, 7)
    assert browser.get("block", take=1, prompt=GREEN)["block"] <= take["start"] + 2
    last = browser.get("stored", take=1)["block"]
    for number, expected in ((0, "red"), (1, "red")):  # the line of take 1 begins with take 0's blocks
        data = client.get(f"/api/rooms/{room}/block/{number}/2").content
        assert drawn.colour_of(images.decode(list(split(data))[1])) == expected
    assert client.get(f"/api/rooms/{room}/thumb/1/{last}").headers["content-type"] == "image/png"
    assert client.get(f"/api/rooms/{room}/block/0/99999").status_code == 404
    browser.send(type="rewind", take=0, block=0)
    assert state_with(browser, current=2)["takes"][2]["start"] == 0
    browser.send(type="rewind", take=77, block=0)
    assert "no longer kept" in browser.get("error")["text"]


def test_history_and_snapshots_are_bounded():
    config = dataclasses.replace(CONFIG, history_bytes=300_000, snapshots=5)
    app = create_app(drawn.pipeline(), config)
    with (
        TestClient(app, base_url="http://localhost") as client,
        client.websocket_connect("ws://localhost/ws") as socket,
    ):
        browser = Browser(socket)
        room = browser.open()
        browser.get("stored", block=40)
        kept = browser.get("stats")["kept"]
        assert 2 <= len(kept) <= 5
        files = list(app.state.lobby.rooms[room].folder.iterdir())
        assert sum(path.stat().st_size for path in files) < 400_000
        assert client.get(f"/api/rooms/{room}/block/0/0").status_code == 404
        blocks = [block for _, block in kept]
        assert blocks == sorted(blocks)
        browser.send(type="end")
        browser.get("closed")


def test_downloads_hold_what_was_shown(client, connect, tmp_path):
    browser = connect()
    room = browser.open(RED)
    browser.send(type="switch", prompt=BLUE)
    begin = browser.get("block", prompt=BLUE)["first"]
    browser.get("stored", block=browser.get("block", prompt=BLUE)["block"] + 1)
    path = tmp_path / "video.mp4"
    answer = client.get(f"/api/rooms/{room}/video.mp4?take=0")
    assert answer.headers["content-type"] == "video/mp4"
    path.write_bytes(answer.content)
    frames = read_video(path)
    assert drawn.colour_of(frames[0]) == "red"
    assert drawn.colour_of(frames[begin + 2]) == "blue"
    recorded = client.get(f"/api/rooms/{room}/session.json").json()
    assert recorded["prompt"] == RED
    assert [event["prompt"] for event in recorded["events"]] == [BLUE]


def test_an_uploaded_session_is_played_again(client, connect):
    browser = connect()
    room = browser.open(RED)
    browser.send(type="switch", prompt=BLUE)
    block = browser.get("block", prompt=BLUE)["block"]
    recorded = client.get(f"/api/rooms/{room}/session.json").content
    answer = client.post(
        f"/api/rooms/{room}/session", content=recorded, headers={"x-longlive-key": browser.key}
    )
    assert (answer.status_code, answer.text) == (200, "ok")
    assert state_with(browser, current=1)["takes"][1]["label"] == "Session file"
    assert browser.get("block", take=1, block=0)["prompt"] == RED
    assert browser.get("block", take=1, prompt=BLUE)["block"] == block
    large = json.loads(recorded)
    large["config"]["window"]["window_frames"] = 999
    answer = client.post(
        f"/api/rooms/{room}/session", content=json.dumps(large), headers={"x-longlive-key": browser.key}
    )
    assert answer.status_code == 422
    assert "at most 24 frames" in answer.text


# --- comparisons ------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["here", "start"])
def test_two_futures_side_by_side(connect, origin):
    browser = connect()
    browser.open(RED)
    browser.get("stored", block=3)
    sides = {"left": {"policy": "recache"}, "right": {"policy": "keep"}}
    browser.send(type="compare", prompt=BLUE, origin=origin, **sides)
    state = wait_for(lambda: (found := browser.get("state"))["compare"] and found)
    assert [side["label"] for side in state["compare"]] == ["recache", "keep"]
    browser.get("block", prompt=BLUE)
    seen: dict[int, dict[int, str]] = {1: {}, 2: {}}
    while len(seen[2]) < 16:
        header, image = browser.frame()
        seen[header["channel"]][header["index"]] = drawn.colour_of(images.decode(image))
    both = sorted(set(seen[1]) & set(seen[2]))
    assert seen[1][both[0]] == "blue"
    assert seen[2][both[0]] == "red", "the side that keeps its memory obeys later"
    browser.send(type="switch", prompt=GREEN)
    browser.get("block", prompt=GREEN)
    browser.send(type="keep", side="right")
    state = browser.get("state", compare=None)
    assert state["settings"]["policy"] == "keep"
    assert state["current"] == 2
    header, _ = browser.frame()
    while header["take"] != 2 or header["channel"] != 0:
        header, _ = browser.frame()
    assert len(DrawnSession.open) == 1


def test_a_comparison_can_be_left(connect):
    browser = connect()
    browser.open(RED)
    browser.send(type="compare", left={"steps": [1000]}, right={"window": 24})
    wait_for(lambda: browser.get("state")["compare"])
    browser.send(type="change", seed=3)
    assert "choose a side" in browser.get("error")["text"]
    browser.send(type="keep", side="neither")
    assert browser.get("state", compare=None)["current"] == 0
    assert len(DrawnSession.open) == 1
    browser.send(type="compare", left={"window": 25}, right={})
    assert "at most 24 frames" in browser.get("error")["text"]


# --- what goes wrong --------------------------------------------------------------------------------


def test_malformed_messages_do_not_end_anything(connect):
    browser = connect()
    browser.open()
    for bad in ("", "{", "[]", '{"type":1}', '{"type":"switch"}', "[" * 4000, "x" * 20000):
        browser.socket.send_text(bad)
        assert browser.get("error")["text"]
    browser.socket.send_bytes(b"\x00\xff")
    assert "binary" in browser.get("error")["text"]
    browser.send(type="hello", key="")
    assert "hello was said" in browser.get("error")["text"]
    browser.frame()


def test_an_exception_is_shown_and_the_session_restarts(connect):
    browser = connect()
    browser.open(RED)
    browser.get("stored", block=5)
    DrawnSession.failing.set()
    state = state_with(browser, phase="failed")
    assert "failed: on purpose" in state["error"]
    browser.send(type="switch", prompt=BLUE)
    assert "restart it first" in browser.get("error")["text"]
    DrawnSession.failing.clear()
    browser.send(type="restart")
    state = state_with(browser, phase="running")
    assert browser.get("block")["block"] >= 1, "it goes back to the latest kept state, not to the beginning"
    browser.send(type="switch", prompt=BLUE)
    browser.get("block", prompt=BLUE)


def test_a_session_that_cannot_begin_says_so(connect, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("longlive_jax.serve.studio.Session", broken)
    browser = connect()
    browser.send(type="open", prompt=RED)
    assert "out of memory" in state_with(browser, phase="failed")["error"]
    monkeypatch.setattr("longlive_jax.serve.studio.Session", DrawnSession)
    browser.send(type="restart")
    state_with(browser, phase="running")
    browser.frame()
    browser.send(type="leave")
    browser.get("lobby")


def test_open_with_what_does_not_fit_is_refused(connect):
    browser = connect()
    browser.send(type="open", prompt=RED, settings={"window": 4})
    assert "at least" in browser.get("error")["text"]
    browser.send(type="watch", room="nowhere")
    assert "has ended" in browser.get("error")["text"]
    browser.send(type="pause")
    assert "open or watch" in browser.get("error")["text"]


# --- people -----------------------------------------------------------------------------------------


def test_one_is_in_control_and_passes_it_on(connect):
    first, second, third = connect(), connect(), connect()
    room = first.open()
    for other in (second, third):
        other.send(type="watch", room=room)
        assert other.get("presence")["role"] == "watch"
        other.frame()
    second.send(type="switch", prompt=BLUE)
    assert "in control" in second.get("error")["text"]
    third.send(type="claim")
    assert first.get("presence", asking=[third.welcome["name"]])["role"] == "control"
    first.send(type="release")
    assert third.get("presence", role="control")["viewers"] == 3
    third.send(type="switch", prompt=BLUE)
    second.get("block", prompt=BLUE)
    third.send(type="leave")
    assert third.get("lobby")["rooms"][0]["id"] == room
    first.get("presence", role="control", viewers=2)


def test_sessions_are_limited_and_queued(connect):
    first, second, third = connect(), connect(), connect()
    first.open()
    second.send(type="open", prompt=BLUE)
    assert second.get("lobby", place=1)["free"] == 0
    third.send(type="open", prompt=GREEN)
    third.get("lobby", place=2)
    second.send(type="cancel")
    third.get("lobby", place=1)
    first.send(type="leave")
    third.get("room")
    assert third.get("block")["prompt"] == GREEN


def test_a_dropped_connection_keeps_its_place(client):
    with client.websocket_connect("ws://localhost/ws") as socket:
        browser = Browser(socket)
        room = browser.open()
    with client.websocket_connect("ws://localhost/ws") as socket:
        again = Browser(socket, key=browser.key)
        assert again.key == browser.key
        assert again.get("room")["id"] == room
        assert again.get("presence")["role"] == "control"
        again.frame()


def test_a_browser_that_stays_away_frees_its_session(client):
    with client.websocket_connect("ws://localhost/ws") as socket:
        Browser(socket).open()
        assert client.get("/api/status").json() == {"sessions": 1, "sockets": 1, "waiting": 0}
    wait_for(lambda: client.get("/api/status").json() == {"sessions": 0, "sockets": 0, "waiting": 0})
    assert not DrawnSession.open


def test_control_passes_on_when_its_browser_stays_away(client, connect):
    with client.websocket_connect("ws://localhost/ws") as socket:
        room = Browser(socket).open()
        other = connect()
        other.send(type="watch", room=room)
        assert other.get("presence")["role"] == "watch"
        other.send(type="pause")
        assert "control" in other.get("error")["text"]
    assert other.get("presence", role="control")["viewers"] == 1
    other.send(type="pause")
    state_with(other, paused=True)


def test_an_idle_session_makes_room_only_when_others_wait(connect, monkeypatch):
    config = dataclasses.replace(CONFIG, idle_seconds=0.6)
    app = create_app(drawn.pipeline(), config)
    with (
        TestClient(app, base_url="http://localhost") as client,
        client.websocket_connect("ws://localhost/ws") as one,
    ):
        first = Browser(one)
        first.open()
        time.sleep(4 * lobby._TICK_SECONDS)
        first.frame()
        with client.websocket_connect("ws://localhost/ws") as two:
            second = Browser(two)
            second.send(type="open", prompt=BLUE)
            assert "others wait" in first.get("closed")["reason"]
            second.get("room")


def test_the_studio_can_be_full(client):
    app = create_app(drawn.pipeline(), dataclasses.replace(CONFIG, sockets=1, waiting=0))
    with (
        TestClient(app, base_url="http://localhost") as client,
        client.websocket_connect("ws://localhost/ws") as one,
    ):
        Browser(one)
        with client.websocket_connect("ws://localhost/ws") as two:
            two.send_text('{"type":"hello"}')
            message = two.receive()
            assert message["type"] == "websocket.close"
            assert "full" in message["reason"]


def test_a_slow_viewer_loses_the_oldest_frames_and_no_message():
    async def scenario() -> None:
        outbox = Outbox()
        for number in range(10):
            outbox.put(f"text {number}")
            outbox.put_frame(b"%d" % number)
        got = [await outbox.get() for _ in range(14)]
        assert [item for item in got if isinstance(item, str)] == [f"text {number}" for number in range(10)]
        assert [item for item in got if isinstance(item, bytes)] == [b"6", b"7", b"8", b"9"]
        assert outbox.dropped == 6
        for _ in range(1000):  # a browser that never reads is let go instead of filling the memory
            outbox.put("more")
        assert await outbox.get() is None
        assert outbox.close_code == TRY_AGAIN

    asyncio.run(scenario())


def test_generation_waits_for_the_controller_and_for_nobody_else():
    flow = Flow(limit=4)
    for _ in range(3):
        flow.publish()
    assert flow.has_room()
    flow.publish()
    assert not flow.has_room(), "the event loop has not taken them yet"
    flow.report(accepted=4, backlog=4)
    assert not flow.has_room(), "they wait for the controller's socket"
    flow.report(backlog=1)
    assert flow.has_room()
    flow.report(backlog=9)
    flow.close()
    assert flow.has_room()


def test_a_frame_is_the_same_after_the_way_to_the_browser():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.decode(images.encode(frame)), frame)
    smooth = np.repeat(np.linspace(0, 255, 832)[None, :, None], 480, 0).repeat(3, 2).astype(np.uint8)
    assert images.encode(smooth).startswith(b"\xff\xd8")
    assert np.abs(images.decode(images.encode(smooth)).astype(int) - smooth).mean() < 2
    assert len(io.BytesIO(images.thumbnail(smooth)).getvalue()) < 5000
