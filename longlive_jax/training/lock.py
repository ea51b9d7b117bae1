"""One live run per folder: two would delete each other's half-written checkpoints.

Opening a folder's checkpoints removes what an interrupted run left half-written. If that run is still
alive, its next save fails. So a run holds an advisory lock on a file of its folder; the kernel lets go of
it when the process ends, however it ends, so there is never anything to clean up.
"""

import fcntl
import os
import pathlib
import socket

import jax

from longlive_jax.errors import UserError
from longlive_jax.training import processes

LOCK_FILE = ".lock"


class RunLock:
    """Holds a run's folder while it is open; the first of several processes holds it for all.

    Args:
      folder: the run's folder; made if need be.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._file: int | None = None

    def __enter__(self) -> "RunLock":
        problem = self._acquire() if jax.process_index() == 0 else None
        problem = processes.first_says(problem)
        if problem is not None:
            raise UserError(problem)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _acquire(self) -> str | None:
        """Takes the lock; returns what is in the way."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return f"run.folder={self._folder} cannot be written ({error.strerror}); choose another place"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            return f"run.folder={self._folder} is in use by {holder}; stop that run, or name another folder"
        except OSError:
            # Some network file systems have no locks. Training there is possible, only not guarded.
            os.close(file)
            return None
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file
        return None
