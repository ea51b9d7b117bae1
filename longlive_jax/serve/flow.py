"""Keeps the studio from running away from the one in control."""

import threading

CONTROLLER_FRAMES = 32
"""Frames that may wait for the controller's socket before generation waits for it."""


class Flow:
    """Frames between the studio's thread and the controller's socket."""

    def __init__(self, limit: int = CONTROLLER_FRAMES) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._published = self._accepted = self._backlog = 0
        self._is_closed = False

    def publish(self) -> None:
        """A frame was handed to the event loop."""
        with self._lock:
            self._published += 1

    def report(self, *, accepted: int = 0, backlog: int) -> None:
        """The event loop took frames, and so many wait for the controller."""
        with self._lock:
            self._accepted += accepted
            self._backlog = backlog

    def has_room(self) -> bool:
        """Whether another frame may come."""
        with self._lock:
            return self._is_closed or self._published - self._accepted + self._backlog < self._limit

    def close(self) -> None:
        """Nothing waits any more."""
        with self._lock:
            self._is_closed = True
