"""States a video can go back to: a bounded number, close together in what was just shown."""

import dataclasses

import jax

from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.serve.history import History
from longlive_jax.serve.settings import ServeConfig
from longlive_jax.session import Session, Snapshot

_EVERY_BLOCKS = 2
_MAX_SNAPSHOTS = 48
_SWITCH_WEIGHT = 4.0  # a prompt's beginning is where people go back to


@dataclasses.dataclass(frozen=True)
class Root:
    """How a session began: its pipeline under its first settings, its first prompt and its first seed."""

    pipe: Pipeline
    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """A state between two blocks.

    Attributes:
      take: on whose line it lies.
      block: the first block that is generated after it.
      snapshot: the state.
      root: how its session began.
      is_switch: whether a prompt began right before it.
    """

    take: int
    block: int
    snapshot: Snapshot
    root: Root
    is_switch: bool


class Keeper:
    """Takes snapshots and thins them: the longer ago, the further apart."""

    def __init__(self, history: History, config: ServeConfig) -> None:
        self._history, self._config = history, config
        self._kept: list[Kept] = []
        self._roots: dict[int, Root] = {}

    def offer(self, take: int, root: Root, session: Session, *, is_switch: bool) -> None:
        """Keeps the state a session is in, where it is time for that."""
        block = session.next_block
        if self._config.snapshots == 0 or (block % _EVERY_BLOCKS and not is_switch):
            return
        # The block under way will be in the history when somebody goes back; the next one is to change.
        taken = session.snapshot(place=self._config.snapshot_place)
        snapshot = dataclasses.replace(taken, flight=None, requests=())
        self._kept.append(Kept(take, block, snapshot, root, is_switch))
        self._kept = [kept for kept in self._kept if kept.take in self._history.takes]
        while len(self._kept) > self._most(snapshot.nbytes):
            self._kept.remove(self._least())

    def best(self, take: int, block: int) -> Kept | None:
        """The latest state on the line of a take from which `block` is still ahead."""
        on_line = [kept for kept in self._on_line(take) if kept.block <= block]
        return max(on_line, key=lambda kept: kept.block, default=None)

    def latest_sound(self, take: int) -> Kept | None:
        """The latest state on the line of a take that was computed without a fault."""
        for kept in sorted(self._on_line(take), key=lambda kept: kept.block, reverse=True):
            try:
                jax.block_until_ready(kept.snapshot.moment.stream)
            except Exception:  # it was copied from what had failed already
                self._kept.remove(kept)
                continue
            return kept
        return None

    def points(self) -> list[tuple[int, int]]:
        """Where one can go back to exactly: (take, block)."""
        return [
            (kept.take, kept.block)
            for kept in self._kept
            if kept.take in self._history.takes and self._history.owns(kept.take, kept.take, kept.block)
        ]

    def note_root(self, take: int, root: Root) -> None:
        """Remembers how the session of a take began."""
        self._roots = {number: r for number, r in self._roots.items() if number in self._history.takes}
        self._roots[take] = root

    def root_of(self, take: int, default: Root) -> Root:
        """How the session of a take's line began."""
        for number, _, _ in reversed(self._history.line(take)):
            if number in self._roots:
                return self._roots[number]
        return default

    def clear(self) -> None:
        """Lets all memory go."""
        self._kept.clear()
        self._roots.clear()

    def _most(self, nbytes: int) -> int:
        if self._config.snapshots is not None:
            return self._config.snapshots
        return min(max(self._config.snapshot_bytes // max(nbytes, 1), 2), _MAX_SNAPSHOTS)

    def _on_line(self, take: int) -> list[Kept]:
        return [kept for kept in self._kept if self._history.owns(take, kept.take, kept.block)]

    def _least(self) -> Kept:
        """The one whose going leaves the smallest hole, measured against how long ago it is."""
        newest = max(kept.block for kept in self._kept)

        def worth(index: int) -> float:
            kept = self._kept[index]
            same = [other.block for other in self._kept if other.take == kept.take]
            before = max((block for block in same if block < kept.block), default=0)
            after = min((block for block in same if block > kept.block), default=kept.block + _EVERY_BLOCKS)
            weight = _SWITCH_WEIGHT if kept.is_switch else 1.0
            return weight * (after - before) / (newest - kept.block + 1)

        candidates = range(len(self._kept) - 1) if len(self._kept) > 1 else range(1)
        return self._kept[min(candidates, key=worth)]
