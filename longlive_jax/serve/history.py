"""What has been shown: takes, their prompts, and the frames on disk.

A take is one way the video went. Rewinding begins another one, which shares the blocks before it with the
take it branched from. Frames lie in one file per block; when a session's share of the disk is full the
oldest go. What stays in memory does not grow with the length of the video.
"""

import dataclasses
import pathlib
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from longlive_jax import video
from longlive_jax.errors import require
from longlive_jax.serve import images

MAX_TAKES = 40
MAX_SPANS = 400
_COUNT = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class Span:
    """Blocks under one prompt, up to the next span.

    Attributes:
      block: the first one.
      prompt: the text.
      policy: what happened to the cache before it; None at the first prompt.
    """

    block: int
    prompt: str
    policy: str | None


@dataclasses.dataclass
class Take:
    """One way the video went.

    Attributes:
      number: its name.
      parent: the take it branched from, or None.
      start: its first own block.
      end: one past its last block.
      label: what a person reads.
      spans: its prompts, from `start` on.
    """

    number: int
    parent: int | None
    start: int
    end: int
    label: str
    spans: list[Span]

    def shown(self) -> dict[str, Any]:
        """For the browser."""
        return {
            "id": self.number,
            "parent": self.parent,
            "start": self.start,
            "end": self.end,
            "label": self.label,
            "spans": [[span.block, span.prompt, span.policy] for span in self.spans],
        }


class History:
    """The takes of one session. Written by one thread, read by any.

    Attributes:
      takes: by number.
      in_use: numbers of takes that are on the screen, and so are never forgotten.
    """

    def __init__(self, folder: pathlib.Path, *, limit_bytes: int) -> None:
        self.takes: dict[int, Take] = {}
        self.in_use: set[int] = set()
        self._folder, self._limit = folder, limit_bytes
        self._files: deque[tuple[int, int, int]] = deque()  # (take, block, bytes), oldest first
        self._bytes = self._count = 0
        self._lock = threading.Lock()

    # --- takes ---------------------------------------------------------------------------------------

    def begin(self, parent: int | None, start: int, *, label: str | None = None) -> Take:
        """A new take; the oldest that no other one needs is forgotten where there are too many."""
        with self._lock:
            if parent is not None:
                parent = self._owner(parent, start - 1) if start > 0 else None
            number, self._count = self._count, self._count + 1
            take = Take(number, parent, start, start, label or f"Take {number + 1}", [])
            self.takes[number] = take
            if len(self.takes) > MAX_TAKES:
                self._forget_one(keep=take)
            return take

    def note(self, take: Take, block: int, prompt: str, policy: str | None) -> None:
        """Remembers what a block of the take is shown under, where that is new."""
        with self._lock:
            inherited = self.span_at(take.number, block)
            if inherited is None or inherited.prompt != prompt or policy is not None:
                take.spans.append(Span(block, prompt, policy))
                del take.spans[:-MAX_SPANS]

    def line(self, take: int) -> list[tuple[int, int, int]]:
        """The blocks a take consists of: (take, first, end) from the beginning on."""
        parts, end, number = [], None, take
        while number is not None and number in self.takes:
            owner = self.takes[number]
            parts.append((number, owner.start, owner.end if end is None else min(end, owner.end)))
            end, parent = owner.start, owner.parent
            number = parent  # type: ignore[assignment]
        return parts[::-1]

    def span_at(self, take: int, block: int) -> Span | None:
        """What a block of a take's line is shown under."""
        for number, _, end in reversed(self.line(take)):
            limit = max(end, block + 1) if number == take else end
            before = [s for s in self.takes[number].spans if s.block <= block and s.block < limit]
            if before:
                return before[-1]
        return None

    def end(self, take: int) -> int:
        """One past the last block of a take."""
        return self.takes[take].end if take in self.takes else 0

    def _owner(self, take: int, block: int) -> int:
        """The take of the line that holds a block."""
        for number, first, _ in reversed(self.line(take)):
            if block >= first:
                return number
        return take

    def owns(self, line_of: int, take: int, block: int) -> bool:
        """Whether the state before `block` of `take` lies on the line of another take."""
        return any(number == take and first <= block <= end for number, first, end in self.line(line_of))

    def _forget_one(self, *, keep: Take) -> None:
        needed = {number for shown in (keep.number, *self.in_use) for number, _, _ in self.line(shown)}
        parents = {take.parent for take in self.takes.values()}
        for number in list(self.takes):
            if number not in needed and number not in parents:
                del self.takes[number]
                for entry in [entry for entry in self._files if entry[0] == number]:
                    self._drop(entry)
                return

    # --- frames --------------------------------------------------------------------------------------

    def store(self, take: Take, block: int, thumb: bytes, frames: Sequence[bytes]) -> None:
        """Keeps one block's encoded frames, and lets the oldest go where there is no room."""
        parts = [thumb, *frames]
        data = b"".join([_COUNT.pack(len(parts)), *(_COUNT.pack(len(part)) for part in parts), *parts])
        self._path(take.number, block).write_bytes(data)
        with self._lock:
            take.end = block + 1
            self._files.append((take.number, block, len(data)))
            self._bytes += len(data)
            while self._bytes > self._limit and len(self._files) > 1:
                self._drop(self._files[0])

    def read(self, take: int, block: int) -> bytes | None:
        """The file of a block in the line of a take: a count, lengths, a thumbnail and the frames."""
        with self._lock:
            number = self._owner(take, block)
        try:
            return self._path(number, block).read_bytes()
        except FileNotFoundError:
            return None

    def export(self, take: int, path: pathlib.Path, *, fps: int) -> int:
        """Writes the frames of a take that are kept as a video file.

        Returns:
          How many frames.

        Raises:
          UserError: none is kept, or the disk is full.
        """
        with self._lock:
            parts = self.line(take)
        blocks = [(number, block) for number, first, end in parts for block in range(first, end)]
        writer, count = None, 0
        try:
            for data in filter(None, (self.read(*name) for name in blocks)):
                for image in list(split(data))[1:]:
                    frame = images.decode(image)
                    if writer is None:
                        height, width = frame.shape[:2]
                        writer = video.open_writer(path, fps=fps, height=height, width=width)
                    writer.write(frame[None])
                    count += 1
            require(count > 0, "nothing has been shown yet; wait for the first frames")
        finally:
            if writer is not None:
                writer.close()
        return count

    def shown(self) -> list[dict[str, Any]]:
        """All takes, for the browser."""
        with self._lock:
            return [take.shown() for take in self.takes.values()]

    def oldest(self) -> dict[int, int]:
        """For each take the first block whose frames are kept."""
        found: dict[int, int] = {}
        with self._lock:
            for take, block, _ in self._files:
                found[take] = min(block, found.get(take, block))
        return found

    def _drop(self, entry: tuple[int, int, int]) -> None:
        self._files.remove(entry)
        self._bytes -= entry[2]
        self._path(*entry[:2]).unlink(missing_ok=True)

    def _path(self, take: int, block: int) -> pathlib.Path:
        return self._folder / f"{take}-{block}"


def split(data: bytes) -> Iterator[bytes]:
    """The parts of a block's file: the thumbnail, then the frames."""
    (count,) = _COUNT.unpack_from(data)
    lengths = [_COUNT.unpack_from(data, _COUNT.size * (1 + i))[0] for i in range(count)]
    at = _COUNT.size * (1 + count)
    for length in lengths:
        yield data[at : at + length]
        at += length
