"""How far a long run is: a bar on a terminal, a line now and then in a log; rate and time left."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

_LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Progress:
    """Counts work done by several threads.

    Args:
      work: what there is to do, in latent frames of all clips.
      is_quiet: show nothing.
      unit: what the work counts.
    """

    def __init__(self, work: int, *, is_quiet: bool, unit: str = "latent frames") -> None:
        self._work, self._done, self._unit = work, 0, unit
        self._lock = threading.Lock()
        self._started = self._last_line = time.monotonic()
        self._is_quiet = is_quiet
        self._bar: Any = None
        if not is_quiet and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("", total=work, rate="", left="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str) -> None:
        """Says what is begun."""
        with self._lock:
            self._show(name, is_due=True)

    def advance(self, work: int, name: str = "") -> None:
        """Counts work done."""
        with self._lock:
            self._done += work
            self._show(name, is_due=time.monotonic() - self._last_line > _LINE_EVERY)

    def _show(self, name: str, *, is_due: bool) -> None:
        seconds = time.monotonic() - self._started
        rate = self._done / max(seconds, 1e-9)
        left = duration((self._work - self._done) / rate) + " left" if self._done else ""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done,
                rate=f"{rate:.1f} {self._unit}/s" if self._done else "",
                left=left,
                **({"description": name} if name else {}),
            )
        elif not self._is_quiet and is_due:
            self._last_line = time.monotonic()
            share = f"{self._done / max(self._work, 1):4.0%}"
            speed = f"{rate:.1f} {self._unit}/s" if self._done else ""
            print(
                *(part for part in (share, name, speed, left) if part), sep="  ", file=sys.stderr, flush=True
            )


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar() -> Any:
    import rich.console
    import rich.progress as rp

    return rp.Progress(
        rp.TextColumn("{task.description}", markup=False),
        rp.BarColumn(),
        rp.TextColumn("{task.percentage:>3.0f}%"),
        rp.TextColumn("{task.fields[rate]}", markup=False),
        rp.TextColumn("{task.fields[left]}", markup=False),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
