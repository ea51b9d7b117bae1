"""Progress on standard error: a bar on a terminal, a line now and then in a log."""

import collections
import contextlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal
_PROMPT_WIDTH = 40
_RATES = 64  # blocks the rate is taken over


class GenerateProgress:
    """Shows how far a generation is: video frames, frames per second, time left, current prompt.

    The rate is that of the median block after the first: the text encoder and compilation, which are
    paid once (and again where a prompt first switches), do not count.

    Args:
      total: video frames in all, over all videos.
      is_quiet: show nothing.
    """

    def __init__(self, total: int, *, is_quiet: bool) -> None:
        self._total, self._done = total, 0
        self._last_block: float | None = None
        self._rates: collections.deque[float] = collections.deque(maxlen=_RATES)
        self._last_line = time.monotonic()
        self._is_quiet = is_quiet
        self._bar: Any = None
        if not is_quiet and sys.stderr.isatty():
            self._bar = _bar("{task.completed}/{task.total} frames", "{task.fields[rate]}")
            self._task = self._bar.add_task("starting", total=total, rate="", left="")

    def __enter__(self) -> "GenerateProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def fps(self) -> float | None:
        """Video frames per second; None before there is a second block."""
        return statistics.median(self._rates) if self._rates else None

    def stage(self, text: str) -> None:
        """Says what is being done before frames come."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif not self._is_quiet:
            print(text, file=sys.stderr, flush=True)

    def advance(self, frames: int, *, prompt: str) -> None:
        """Counts finished video frames.

        Args:
          frames: how many, over all videos of the batch.
          prompt: what they show.
        """
        now = time.monotonic()
        if self._last_block is not None:
            self._rates.append(frames / max(now - self._last_block, 1e-9))
        self._last_block, self._done = now, self._done + frames
        rate = f"{self.fps:.1f} frames/s" if self.fps else ""
        left = self._left()
        if self._bar is not None:
            short = prompt if len(prompt) <= _PROMPT_WIDTH else f"{prompt[: _PROMPT_WIDTH - 3]}..."
            self._bar.update(self._task, completed=self._done, description=short, rate=rate, left=left)
        elif not self._is_quiet and now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            line = f"{self._done}/{self._total} frames  {rate}  {left}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def _left(self) -> str:
        if not self.fps:
            return ""
        minutes, seconds = divmod(round((self._total - self._done) / self.fps), 60)
        return f"{minutes}:{seconds:02d} left"


class LiveStatus:
    """One line about a video that has no end: frames per second, how long it is, what it shows.

    On a terminal the line stands above the one that is being typed; elsewhere there is a line for every
    new prompt, and one now and then.
    """

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._is_live = not is_quiet and sys.stderr.isatty()
        self._rates: collections.deque[float] = collections.deque(maxlen=_RATES)
        self._last_line, self._last_prompt = float("-inf"), ""

    @property
    def fps(self) -> float | None:
        """Video frames per second of the median block; None before there is a second one."""
        return statistics.median(self._rates) if self._rates else None

    def stage(self, text: str) -> None:
        """Says what is being done before frames come."""
        if not self._is_quiet:
            self._write(f"{text}\n")

    def ask(self) -> None:
        """Opens a line to type in, with one above it for the status."""
        if self._is_live:
            self._write("\n> ")

    def show(self, prompt: str, frames: int, *, seconds: float, interval: float | None) -> None:
        """Tells of a block.

        Args:
          prompt: what it shows.
          frames: its video frames.
          seconds: length of the video so far.
          interval: seconds it took; None where that says nothing.
        """
        if interval is not None:
            self._rates.append(frames / max(interval, 1e-9))
        rate = f"{self.fps:5.1f} frames/s  " if self.fps else ""
        minutes, rest = divmod(seconds, 60)
        text = f"{rate}{minutes:.0f}:{rest:04.1f}  {prompt}"
        now = time.monotonic()
        if self._is_live:
            width = shutil.get_terminal_size().columns - 1
            # Save the cursor, up one line, clear it, and back to what is being typed.
            self._write(f"\x1b7\x1b[1A\r\x1b[2K{text[:width]}\x1b8")
        elif not self._is_quiet and (prompt != self._last_prompt or now - self._last_line >= _LINE_EVERY):
            self._write(f"{text}\n")
            self._last_line, self._last_prompt = now, prompt

    def end(self) -> None:
        """Leaves the line that was being typed."""
        if self._is_live:
            self._write("\n")

    def _write(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def bytes_progress(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for conversion: yields a function of (part, bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield lambda part, done, total: None
        return
    bar = _bar("{task.fields[rate]}")
    task = bar.add_task(verb, total=None, rate="", left="")

    def advance(part: str, done: int, total: int) -> None:
        rate = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
        bar.update(task, description=f"{verb} {part}", completed=done, total=total, rate=rate)

    with bar:
        yield advance


def _bar(*columns: str) -> Any:
    """A rich progress bar on standard error; imported late, help does not need it."""
    import rich.console
    import rich.progress as rp

    return rp.Progress(
        # Prompts are text, not markup: brackets in them mean nothing.
        rp.TextColumn("{task.description}", markup=False),
        rp.BarColumn(),
        *(rp.TextColumn(column, markup=False) for column in columns),
        rp.TextColumn("{task.fields[left]}"),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
