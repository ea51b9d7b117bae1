"""A session on the screen, and what is sent about it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from longlive_jax.config import PipelineConfig
from longlive_jax.serve import protocol
from longlive_jax.serve.history import Take
from longlive_jax.serve.kept import Root
from longlive_jax.session import Session


class Frame(NamedTuple):
    """One message of `protocol.pack_frame`."""

    data: bytes


Emit = Callable[[dict[str, Any] | Frame], None]


@dataclasses.dataclass
class Lane:
    """A session on the screen.

    Attributes:
      session: the session.
      root: how it began.
      take: where its blocks go.
      config: under which settings the next prompt runs; the session's own may not have been taken up yet.
      seed: likewise.
      channel: which picture of the page shows it.
    """

    session: Session
    root: Root
    take: Take
    config: PipelineConfig
    seed: int
    channel: protocol.Channel = 0


def close(lanes: Sequence[Lane]) -> None:
    """Closes the sessions of lanes; one may be there twice."""
    for lane in lanes:
        lane.session.close()
