"""Twenty viewers for a minute: the controller misses nothing, and afterwards everything is as before."""

import asyncio
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import threading
import time

import pytest
import websockets
from websockets.asyncio.client import connect

from longlive_jax.serve import protocol
from tests.serve.conftest import CONFIG, served
from tests.serve.drawn import BLUE, RED, DrawnSession
from tests.serve.page import wait_for

SECONDS, VIEWERS, SLOW = 60, 20, 5
_ALLOWED_GROWTH = 12 << 20


class Viewer:
    """One socket and the frames it got."""

    def __init__(self, address: str, *, wait: float = 0.0) -> None:
        self.indices: list[int] = []
        self.events: list[dict] = []
        self._address, self._wait = address, wait

    async def run(self, opening: dict | None, room: asyncio.Future, end: asyncio.Event) -> None:
        """Opens a session or watches the one in `room`, until the end."""
        async with connect(self._address, max_queue=4, compression=None) as socket:
            await socket.send('{"type":"hello"}')
            if opening is None:
                await socket.send(json.dumps({"type": "watch", "room": await room}))
            else:
                await socket.send(json.dumps(opening))
            asking = asyncio.create_task(self._direct(socket)) if opening else None
            while not end.is_set():
                try:
                    async with asyncio.timeout(1):
                        message = await socket.recv()
                except TimeoutError:
                    continue
                if isinstance(message, bytes):
                    self.indices.append(protocol.unpack_frame(message)[0]["index"])
                    await asyncio.sleep(self._wait)
                    continue
                event = json.loads(message)
                self.events.append({name: event.get(name) for name in ("type", "text", "role")})
                if event["type"] == "room" and not room.done():
                    room.set_result(event["id"])
            if asking:
                asking.cancel()

    async def _direct(self, socket: websockets.ClientConnection) -> None:
        prompts = [BLUE, RED]
        while True:
            await asyncio.sleep(3)
            prompts.reverse()
            await socket.send(json.dumps({"type": "switch", "prompt": prompts[0]}))


async def _watch(port: int, seconds: float) -> list[Viewer]:
    address = f"ws://127.0.0.1:{port}/ws"
    viewers = [Viewer(address)] + [Viewer(address, wait=0.12 if i < SLOW else 0.0) for i in range(VIEWERS)]
    room, end = asyncio.get_running_loop().create_future(), asyncio.Event()
    tasks = [
        asyncio.create_task(viewer.run({"type": "open", "prompt": RED} if i == 0 else None, room, end))
        for i, viewer in enumerate(viewers)
    ]
    await asyncio.sleep(seconds)
    end.set()
    await asyncio.gather(*tasks)
    return viewers


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not a leak
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_twenty_viewers_for_a_minute(monkeypatch):
    monkeypatch.setattr(DrawnSession, "seconds", 0.2)
    config = dataclasses.replace(CONFIG, port=0, pace="real", grace_seconds=1.0)
    with served(config) as studio:
        counts = lambda: studio.lobby.counts()  # noqa: E731
        nobody = {"sessions": 0, "sockets": 0, "waiting": 0}
        asyncio.run(_watch(studio.port, 4))  # loads what is loaded once
        wait_for(lambda: counts() == nobody)
        before, threads = resident_bytes(), threading.active_count()
        start = time.monotonic()
        controller, *viewers = asyncio.run(_watch(studio.port, SECONDS))
        wait_for(lambda: counts() == nobody)
        seconds = time.monotonic() - start
        after = resident_bytes()
        assert threading.active_count() <= threads
    print(f"{len(controller.indices)} frames in {seconds:.0f} s, memory {(after - before) / 2**20:+.1f} MiB")
    assert controller.indices == list(range(len(controller.indices)))
    assert len(controller.indices) > 0.9 * 16 * SECONDS
    assert not [event for event in controller.events if event["type"] == "error"]
    fast = viewers[SLOW:]
    assert all(viewer.indices == sorted(viewer.indices) for viewer in viewers)
    assert all(len(viewer.indices) > 0.8 * 16 * SECONDS for viewer in fast)
    assert after - before < _ALLOWED_GROWTH
