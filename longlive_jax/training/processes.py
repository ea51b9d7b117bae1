"""Several processes that train together: how they meet, agree, and part.

Every process runs the same program on its own devices and its own rows of each batch. The first one
also speaks, logs and writes the files; training checkpoints are written by all.
"""

import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.errors import UserError, require

T = TypeVar("T")

CONNECT_SECONDS = 300
"""How long a process waits for the others at the start."""

# Only the first process writes an export, and a large one takes its time; the others wait for it at the end.
_FINISH_SECONDS = 3600
_PART_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Address:
    """One process among several.

    Attributes:
      coordinator: "host:port" where process 0 can be reached by all.
      count: number of processes.
      index: of this one, from 0.
    """

    coordinator: str
    count: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16,
            f"--coordinator {self.coordinator} must be HOST:PORT, as in 10.0.0.1:1234",
        )
        require(self.count > 0, f"--processes {self.count} must be 1 or more")
        require(
            0 <= self.index < self.count,
            f"--process {self.index} must be from 0 to {self.count - 1} (--processes {self.count})",
        )


def connect(address: Address | None) -> None:
    """Joins the processes of a run; before anything touches a device.

    Args:
      address: None finds it in the environment of Slurm, Open MPI, Kubernetes or a Cloud TPU.

    Raises:
      UserError: nothing is found there, or process 0 cannot be reached.
    """
    found: dict[str, Any] = {}
    if address is not None:
        if address.index > 0:
            _wait_for(address.coordinator)
        found = {
            "coordinator_address": address.coordinator,
            "num_processes": address.count,
            "process_id": address.index,
        }
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=CONNECT_SECONDS,
            shutdown_timeout_seconds=_FINISH_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: no cluster is found in the environment ({error}); give --coordinator, "
            "--processes and --process"
        ) from error


def _wait_for(coordinator: str) -> None:
    """Waits until process 0 listens, as JAX gives up by aborting the process with a stack trace."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--coordinator {coordinator} does not answer ({error}); is process 0 started there, and "
                    "the port open?"
                ) from error
        time.sleep(0.2)


def sync(name: str) -> None:
    """Waits until every process is here; nothing for a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_says(problem: str | None) -> str | None:
    """What the first process found wrong, for all of them, so that none waits for one that has given up.

    Args:
      problem: one line; only the first process's counts.

    Returns:
      The line, or for the other processes that there is one; None for none.
    """
    if jax.process_count() == 1:
        return problem
    if not multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
        return None
    return problem if jax.process_index() == 0 else "process 0 refuses to start; see its message"


def to_host(tree: Any) -> Any:
    """A tree of arrays in host memory, gathered from all processes; every process must ask."""

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


class Vote:
    """Lets the processes act on what only one of them knows, all after the same step.

    A vote runs on the devices behind the step under way and is read one step later, like the metrics:
    nobody waits for it.
    """

    def __init__(self) -> None:
        self._devices = Mesh(np.array(jax.devices()), ("all",))
        whole = NamedSharding(self._devices, P())
        self._largest = jax.jit(jnp.max, out_shardings=whole)
        self._pending: jax.Array | None = None

    def cast(self, value: int) -> int:
        """Casts this process's vote.

        Args:
          value: 0 or more; every process must vote.

        Returns:
          The largest value of the vote before; 0 at the first.
        """
        before = self._pending
        own = np.full(jax.local_device_count(), value, np.int32)
        votes = jax.make_array_from_process_local_data(NamedSharding(self._devices, P("all")), own)
        self._pending = self._largest(votes)
        return 0 if before is None else int(before)


def leave(error: BaseException) -> NoReturn:
    """Ends this process after an error, with its message.

    An ordinary exit waits for the other processes, which may be waiting for this one in a step that it
    will never make. If they do not come within seconds this one goes, and its closed connections end them.
    """
    status = 1
    if isinstance(error, UserError):
        status = 2
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        status = 128 + signal.SIGINT
        print("interrupted", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    parting.start()
    parting.join(_PART_SECONDS)
    os._exit(status)
