"""Work side by side: shares of processes, and one thread per device."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from longlive_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of several processes (or machines) that share a folder.

    Attributes:
      index: which one, from 0.
      count: how many.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads `0/4`.

        Raises:
          UserError: it is something else.
        """
        index, slash, count = text.partition("/")
        is_number = slash == "/" and index.isdecimal() and count.isdecimal()
        require(is_number and int(index) < int(count), f"--shard={text} must be I/N with I from 0 to N - 1")
        return cls(int(index), int(count))

    def take(self, items: Sequence[Any]) -> list[Any]:
        """Its share: every `count`-th item."""
        return list(items[self.index :: self.count])


class Stopped(Exception):  # noqa: N818  (not an error: somebody asked for it)
    """Raised inside a thread's work when another one has failed or the run was interrupted."""


def on_each(devices: Sequence[Any], work: Callable[[threading.Event], None]) -> None:
    """Runs `work` once per device, each in a thread whose JAX computations go to that device.

    Args:
      devices: JAX devices.
      work: takes the event that is set when it should end; it may raise `Stopped` then.

    Raises:
      Exception: the first one of any thread, after all have ended. KeyboardInterrupt likewise.
    """
    stop, errors = threading.Event(), []

    def run(device: Any) -> None:
        try:
            with jax.default_device(device):
                work(stop)
        except Stopped:
            pass
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)  # a join would not let Ctrl-C through
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
