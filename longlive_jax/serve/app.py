"""The web application: the page, one socket per browser, downloads and uploads."""

import asyncio
import contextlib
import pathlib
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.serve import images, protocol
from longlive_jax.serve.history import split
from longlive_jax.serve.lobby import Lobby
from longlive_jax.serve.room import TRY_AGAIN, Client, Outbox, Room
from longlive_jax.serve.security import POLICY_VIOLATION, Guard
from longlive_jax.serve.settings import UPLOAD_BYTES, ServeConfig

STATIC = pathlib.Path(__file__).parent / "static"
_HELLO_SECONDS = 10.0
_MESSAGES_PER_SECOND, _BURST = 20.0, 60.0
_MAX_FORM = 4096


def create_app(pipe: Pipeline, config: ServeConfig) -> Starlette:
    """The studio as an ASGI application.

    Args:
      pipe: the models; its window has to be bounded and its rope relative, as for any session.
      config: limits and access.
    """
    lobby = Lobby(pipe, config)
    cookie = f"longlive-{config.port}"
    guard = Guard(_unused, config, cookie=cookie)
    routes = [
        Route("/", _page("index.html")),
        Route("/login", _login_route(guard), methods=["GET", "POST"]),
        Route("/api/status", _status),
        Route("/api/rooms/{room}/thumb/{take:int}/{block:int}", _thumb),
        Route("/api/rooms/{room}/block/{take:int}/{block:int}", _block),
        Route("/api/rooms/{room}/video.mp4", _video),
        Route("/api/rooms/{room}/session.json", _session),
        Route("/api/rooms/{room}/session", _upload, methods=["POST"]),
        WebSocketRoute("/ws", _socket),
        Mount("/static", _Static(directory=STATIC)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        house = asyncio.get_running_loop().create_task(lobby.keep_house())
        yield
        house.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await house

    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, config=config, cookie=cookie)]
    )
    app.state.lobby, app.state.config, app.state.pipe = lobby, config, pipe
    return app


async def _unused(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("the guard of the login page has nothing behind it")


class _Static(StaticFiles):
    """Revalidated every time: an upgrade must not meet an old script."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "no-cache"
        return response


def _page(name: str, *, status: int = 200) -> Any:
    async def page(request: Request) -> Response:
        return FileResponse(STATIC / name, status_code=status)

    return page


def _login_route(guard: Guard) -> Any:
    async def login(request: Request) -> Response:
        if request.method == "GET":
            return FileResponse(STATIC / "login.html")
        body = await _body(request, most=_MAX_FORM)
        given = dict(parse_qsl(body.decode("latin-1"))).get("token", "")
        if guard.is_token(given.strip()):
            return guard.welcome()
        await asyncio.sleep(1)  # guessing is slow
        return FileResponse(STATIC / "login.html", status_code=401)

    return login


# --- the socket -------------------------------------------------------------------------------------


async def _socket(websocket: WebSocket) -> None:
    lobby: Lobby = websocket.app.state.lobby
    await websocket.accept()
    outbox = Outbox()
    try:
        async with asyncio.timeout(_HELLO_SECONDS):
            hello = protocol.parse(await _receive(websocket))
        if not isinstance(hello, protocol.Hello):
            raise UserError("say hello first")
        client = lobby.connect(outbox, hello.key)
    except (UserError, TimeoutError) as error:
        code = TRY_AGAIN if isinstance(error, UserError) else POLICY_VIOLATION
        await websocket.close(code, (str(error) or "say hello first")[:120])
        return
    except WebSocketDisconnect:
        return
    sending = asyncio.create_task(_send(websocket, outbox))
    receiving = asyncio.create_task(_listen(websocket, lobby, client))
    try:
        await asyncio.wait((sending, receiving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        lobby.disconnect(client, outbox)
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)
        with contextlib.suppress(Exception):  # it is closed already, as a rule
            await websocket.close(outbox.close_code or TRY_AGAIN)


async def _send(websocket: WebSocket, outbox: Outbox) -> None:
    while (item := await outbox.get()) is not None:
        if isinstance(item, bytes):
            await websocket.send_bytes(item)
        else:
            await websocket.send_text(item)


async def _listen(websocket: WebSocket, lobby: Lobby, client: Client) -> None:
    """Takes messages at a bounded rate; what is wrong with one is answered and forgotten."""
    allowance, last = _BURST, time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    try:
        while True:
            message = await _receive(websocket)
            now = time.monotonic()
            allowance, last = min(allowance + (now - last) * _MESSAGES_PER_SECOND, _BURST), now
            if allowance < 1:
                await asyncio.sleep((1 - allowance) / _MESSAGES_PER_SECOND)
            allowance -= 1
            try:
                parsed = protocol.parse(message)
            except UserError as error:
                client.tell(type="error", text=str(error))
                continue
            # A request that takes its time must not hold up the next one's answer.
            task = asyncio.create_task(_take(lobby, client, parsed))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except WebSocketDisconnect:
        return


async def _take(lobby: Lobby, client: Client, message: protocol.FromBrowser) -> None:
    try:
        await lobby.take(client, message)
    except UserError as error:
        client.tell(type="error", text=str(error))


async def _receive(websocket: WebSocket) -> str | bytes:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    text = message.get("text")
    return text if text is not None else message.get("bytes", b"")


# --- files ------------------------------------------------------------------------------------------


def _room(request: Request) -> Room:
    lobby: Lobby = request.app.state.lobby
    room = lobby.rooms.get(request.path_params["room"])
    if room is None:
        raise HTTPException(404, "that session has ended")
    return room


async def _status(request: Request) -> Response:
    return JSONResponse(request.app.state.lobby.counts())


async def _read_block(request: Request) -> bytes:
    take, block = request.path_params["take"], request.path_params["block"]
    data = await asyncio.to_thread(_room(request).studio.history.read, take, block)
    if data is None:
        raise HTTPException(404, "these frames are no longer kept")
    return data


_FOREVER = {"cache-control": "private, max-age=86400, immutable"}


async def _thumb(request: Request) -> Response:
    thumb = next(split(await _read_block(request)))
    return Response(thumb, media_type=images.media_type(thumb), headers=_FOREVER)


async def _block(request: Request) -> Response:
    return Response(await _read_block(request), media_type="application/octet-stream", headers=_FOREVER)


async def _video(request: Request) -> Response:
    room = _room(request)
    takes = room.studio.history.takes
    try:
        take = int(request.query_params.get("take", max(list(takes), default=0)))
    except ValueError as error:
        raise HTTPException(400, "take must be a number") from error
    return await _made(request, room, "video.mp4", f"longlive-take-{take + 1}.mp4", lambda path: (
        room.studio.history.export(take, path, fps=request.app.state.pipe.config.video.fps)
    ))  # fmt: skip


async def _session(request: Request) -> Response:
    room = _room(request)
    return await _made(request, room, "x.session.json", "longlive.session.json", room.studio.save)


async def _made(request: Request, room: Room, name: str, shown: str, make: Any) -> Response:
    """Answers with a file made for this request."""
    async with room.exports:  # one after the other: encoding takes the processor from the video
        path = room.folder / f"{time.monotonic_ns()}-{name}"
        try:
            await asyncio.to_thread(make, path)
        except UserError as error:
            raise HTTPException(409, str(error)) from error
    return FileResponse(path, filename=shown, background=BackgroundTask(lambda: path.unlink(missing_ok=True)))


async def _upload(request: Request) -> Response:
    """A session file in the body, from the one in control."""
    room = _room(request)
    client = request.app.state.lobby.client(request.headers.get("x-longlive-key", ""))
    if client is None or client is not room.controller:
        raise HTTPException(403, "somebody else is in control; ask for it first")
    data = await _body(request, most=UPLOAD_BYTES)
    try:
        await room.run(room.studio.load, data)
    except UserError as error:
        raise HTTPException(422, str(error)) from error
    room.used = time.monotonic()
    return PlainTextResponse("ok")


async def _body(request: Request, *, most: int) -> bytes:
    """The body, refused as soon as it is too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"at most {most} bytes are taken")
        parts.append(part)
    return b"".join(parts)
