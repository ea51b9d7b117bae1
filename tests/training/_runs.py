"""Training runs of the tests: smoke configs, and runs in processes of their own that can be killed."""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import pytest

from longlive_jax import sharding
from longlive_jax.training import checkpoint, metrics
from longlive_jax.training.config_file import load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs/toy"

# Slow steps, so that there is time to stop the run between them; nothing else differs.
_PROGRAM = """
import sys, time
from longlive_jax.cli.main import main
from longlive_jax.training import metrics
tick = metrics.Log.tick
def slow(self, *arguments):
    time.sleep(0.3)
    tick(self, *arguments)
metrics.Log.tick = slow
sys.exit(main({words!r}))
"""


@contextlib.contextmanager
def only_one_device() -> Iterator[None]:
    """Stages run on one of the simulated devices: eight of them take turns on the test machine's cores."""
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", one)
        yield


def smoke(name, base, folder, **changes):
    """The smoke config of a stage that starts from `base`; changes are dotted names with "__" for "."."""
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    settings |= {"smoke": "true", "run.folder": str(folder), "base": str(base or "")}
    return load_config(CONFIGS / f"{name}.py", settings)


def words(name, base, folder, **changes) -> list[str]:
    """The command line of the same run."""
    settings = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    fixed = ["train", str(CONFIGS / f"{name}.py"), "--quiet", "smoke=true"]
    return [*fixed, f"base={base or ''}", f"run.folder={folder}", *settings]


def losses(folder: pathlib.Path) -> dict[int, float]:
    """Loss by step, as logged so far."""
    file = folder / metrics.METRICS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def compilations(folder: pathlib.Path) -> dict[int, int]:
    """Programs compiled by the end of every step that was logged."""
    lines = map(json.loads, (folder / metrics.METRICS_FILE).read_text().splitlines())
    return {line["step"]: line["compilations"] for line in lines if "loss" in line}


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]], log: pathlib.Path) -> Iterator[list[subprocess.Popen]]:
    """Runs command lines side by side, one device each, with slow steps; kills what is left at the end."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    running: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        for index, command in enumerate(commands):
            program = [sys.executable, "-c", _PROGRAM.format(words=list(command))]
            out = stack.enter_context((log / f"process_{index}.log").open("w"))
            running.append(subprocess.Popen(program, env=environment, stdout=out, stderr=out))
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


def wait_for_losses(folder: pathlib.Path, count: int, running: Sequence[subprocess.Popen]) -> None:
    """Waits until a run has logged so many losses."""
    _wait_for(lambda: len(losses(folder)) >= count, running, seconds=0.05)


def wait_for_a_write(folder: pathlib.Path, running: Sequence[subprocess.Popen]) -> None:
    """Waits until a run is writing a checkpoint."""
    begun = functools.partial((folder / checkpoint.FOLDER).glob, "*.orbax-checkpoint-tmp*")
    _wait_for(lambda: any(begun()), running, seconds=0.001)


def checkpointed(folder: pathlib.Path) -> set[int]:
    """Steps whose checkpoints a run has published."""
    names = (path.name for path in (folder / checkpoint.FOLDER).iterdir())
    return {int(name) for name in names if name.isdecimal()}


def _wait_for(done: Callable[[], bool], running: Sequence[subprocess.Popen], *, seconds: float) -> None:
    """Asks every so many seconds whether it is done."""
    deadline = time.monotonic() + 240
    while not done():
        assert all(process.poll() is None for process in running), "ended early; see its log"
        assert time.monotonic() < deadline, "took too long; see its log"
        time.sleep(seconds)
