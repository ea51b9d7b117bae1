"""What a studio may use, and the bounds of what it takes from a browser."""

import dataclasses
import ipaddress
import secrets
import socket
from typing import Literal

from longlive_jax.errors import require
from longlive_jax.session.types import Place

Pace = Literal["real", "free"]
"""At the video's frame rate, or as fast as the model generates."""

PROMPT_CHARS = 1000
MESSAGE_BYTES = 16 << 10
UPLOAD_BYTES = 1 << 20
MIN_TOKEN_CHARS = 16
MAX_STEPS = 16
MAX_BLEND_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How a studio is served.

    Attributes:
      host: address to listen on.
      port: port to listen on; 0 takes a free one.
      token: what a browser has to present; empty asks for none, which only a loopback address may do.
      allowed_hosts: further host names the page may be reached under (behind a proxy, say).
      sessions: live videos at the same time.
      sockets: browsers connected at the same time.
      waiting: browsers in the queue for a session.
      grace_seconds: a browser that lost its connection keeps its place and its control for so long.
      idle_seconds: a session whose controller asks for nothing for so long ends when others wait.
      history_bytes: disk for the frames of one session; the oldest are dropped.
      snapshots: states kept to rewind to in one session; None takes what fits `snapshot_bytes`, at least 2.
      snapshot_bytes: see `snapshots`.
      snapshot_place: where they lie.
      pace: how a session begins.
      warms_up: compile prompt switches in the background when a session opens.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token: str = ""
    allowed_hosts: tuple[str, ...] = ()
    sessions: int = 1
    sockets: int = 64
    waiting: int = 32
    grace_seconds: float = 20.0
    idle_seconds: float = 300.0
    history_bytes: int = 512 << 20
    snapshots: int | None = None
    snapshot_bytes: int = 256 << 20
    snapshot_place: Place = "device"
    pace: Pace = "real"
    warms_up: bool = True

    def __post_init__(self) -> None:
        for name in ("sessions", "sockets", "history_bytes", "grace_seconds", "idle_seconds"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.waiting >= 0, f"waiting={self.waiting} must be 0 or more")
        require(0 <= self.port < 1 << 16, f"port={self.port} must be in [0, 65536)")
        require(
            self.snapshots is None or self.snapshots >= 0, f"snapshots={self.snapshots} must be 0 or more"
        )
        require(
            not self.token or len(self.token) >= MIN_TOKEN_CHARS,
            f"token has {len(self.token)} characters; give at least {MIN_TOKEN_CHARS}",
        )
        require(
            bool(self.token) or is_loopback(self.host),
            f"host={self.host} can be reached from other machines; give a token",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """A token nobody can guess."""
    return secrets.token_urlsafe(24)


def page_hosts(config: ServeConfig) -> frozenset[str]:
    """Host names the page may be asked for under, besides plain addresses; lower case."""
    names = {"localhost", config.host, *config.allowed_hosts}
    if not is_loopback(config.host):
        names.add(socket.gethostname())
    return frozenset(name.lower().strip("[]") for name in names)
