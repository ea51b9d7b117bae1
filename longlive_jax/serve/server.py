"""Runs the studio."""

import socket
from collections.abc import Callable

import uvicorn

from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.serve.app import create_app
from longlive_jax.serve.settings import MESSAGE_BYTES, ServeConfig

_SHUTDOWN_SECONDS = 5
_BACKLOG = 128
# What lies in a slow viewer's socket is the past: half a second of video at most, and still 1 MB/s at 200 ms.
_SEND_BUFFER = 128 << 10


def bind(config: ServeConfig) -> socket.socket:
    """Takes the port before anything is loaded.

    Raises:
      UserError: it is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # sockets inherit it
            taken.bind((config.host, config.port))
        except OSError:
            taken.close()
            raise
    except OSError as error:
        raise UserError(
            f"host={config.host} port={config.port} cannot be listened on ({error.strerror}); choose others"
        ) from error
    return taken


def address(config: ServeConfig, port: int) -> str:
    """Where a browser on this machine finds the page."""
    host = config.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"?token={config.token}" if config.token else "")


def server(pipe: Pipeline, config: ServeConfig) -> uvicorn.Server:
    """A server that `run(sockets=[...])` starts and `should_exit` ends."""
    return uvicorn.Server(
        uvicorn.Config(
            create_app(pipe, config),
            # Sends wait while a slow browser's buffer is full, which is how its frames come to be dropped.
            ws="websockets-sansio",
            ws_max_size=4 * MESSAGE_BYTES,
            ws_max_queue=16,
            ws_ping_interval=10,
            ws_ping_timeout=20,
            ws_per_message_deflate=False,  # frames are compressed already
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            server_header=False,
            log_level="warning",
            access_log=False,
            backlog=_BACKLOG,
        )
    )


def run(pipe: Pipeline, config: ServeConfig, taken: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until the process is asked to end.

    Args:
      pipe: the models.
      config: see `ServeConfig`.
      taken: from `bind`.
      ready: called before the first request.
    """
    ready()
    with taken:
        server(pipe, config).run(sockets=[taken])
