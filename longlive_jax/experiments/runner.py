"""Runs what is missing of a study: the plan, the estimate, and the devices side by side."""

import contextlib
import dataclasses
import pathlib
import queue
import statistics
import threading
from collections.abc import Iterator
from typing import Any

import jax

from longlive_jax.errors import UserError, require
from longlive_jax.experiments import cells as cells_lib
from longlive_jax.experiments import store
from longlive_jax.experiments.cells import Cell, Pipelines
from longlive_jax.experiments.parallel import Shard, Stopped, on_each
from longlive_jax.experiments.progress import Progress, duration
from longlive_jax.experiments.study import Study

_PROBE_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study has and what is to be done.

    Attributes:
      cells: all of them.
      missing: those to run here, which is this process's share of those that are not stored.
      devices: what they run on.
    """

    cells: tuple[Cell, ...]
    missing: tuple[Cell, ...]
    devices: tuple[Any, ...]

    @property
    def frames(self) -> int:
        """Latent frames of all missing cells."""
        return sum(cell.frames for cell in self.missing)

    @property
    def is_complete(self) -> bool:
        """Whether every cell is stored by now."""
        return all(cell.is_stored for cell in self.cells)

    def __str__(self) -> str:
        stored = sum(cell.is_stored for cell in self.cells)
        devices = "1 device" if len(self.devices) == 1 else f"{len(self.devices)} devices"
        return (
            f"{len(self.cells)} cells, {stored} stored, {len(self.missing)} to run here on {devices}: "
            f"{self.frames} latent frames"
        )


def make_plan(
    study: Study, folder: pathlib.Path, *, shard: Shard | None = None, devices: int | None = None
) -> Plan:
    """Looks up what is stored and what is to be done; loads no weights.

    Args:
      study: the study.
      folder: where its results are.
      shard: this process's share; default all.
      devices: how many devices to use; default all of this process.

    Raises:
      UserError: a checkpoint or a condition is not usable.
    """
    present = jax.local_devices()
    require(
        devices is None or 0 < devices <= len(present),
        f"--devices={devices} must be between 1 and {len(present)}, the devices there are",
    )
    every = cells_lib.plan(study, folder)
    missing = [cell for cell in (shard or Shard()).take(every) if not cell.is_stored]
    return Plan(
        tuple(every), tuple(missing), tuple(present[: min(devices or len(present), max(len(missing), 1))])
    )


def estimate(plan: Plan) -> str:
    """How long the missing cells will take, in words.

    From the cells that are stored where there are any; else from the first blocks of a missing one, whose
    programs its run needs in any case.
    """
    if not plan.missing:
        return "nothing to run"
    known = [store.read(cell.file) for cell in plan.cells if cell.is_stored]
    if known:
        seconds = plan.frames * sum(c.seconds for c in known) / max(sum(c.frames for c in known), 1)
        basis = f"by {len(known)} stored cells"
    else:
        cell = plan.missing[0]
        with jax.default_device(plan.devices[0]):
            pipe = Pipelines().open(cell, [story.prompt for story in cell.work.stories])
            batch = cell.work.rows(0, cell.study.batch)
            times = list(cells_lib.blocks_timed(pipe, batch, blocks=_PROBE_BLOCKS))
        rate = cell.study.batch * cell.config.window.block_frames / statistics.median(times[1:])
        programs = len({str(c.condition.settings) for c in plan.missing})
        seconds = plan.frames / rate + programs * times[0]
        basis = f"by the first {_PROBE_BLOCKS} blocks"
    return f"about {duration(seconds / len(plan.devices))} {basis}, measuring not included"


def run(plan: Plan, folder: pathlib.Path, *, is_quiet: bool) -> None:
    """Runs the missing cells, as many side by side as there are devices.

    Args:
      plan: of `make_plan`.
      folder: where results go.
      is_quiet: no progress on standard error.

    Raises:
      KeyboardInterrupt: after the threads have ended; what is stored stays.
    """
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in plan.missing:
        waiting.put(cell)
    with Progress(plan.frames, is_quiet=is_quiet) as progress:
        on_each(plan.devices, lambda stop: _run_queue(waiting, plan, folder, progress, stop))


def _run_queue(
    waiting: "queue.SimpleQueue[Cell]",
    plan: Plan,
    folder: pathlib.Path,
    progress: Progress,
    stop: threading.Event,
) -> None:
    """One device's loop."""
    pipelines = Pipelines()
    while not stop.is_set():
        try:
            cell = waiting.get_nowait()
        except queue.Empty:
            return
        progress.start(cell.name)

        def advance(frames: int, name: str = cell.name) -> None:
            if stop.is_set():
                raise Stopped
            progress.advance(frames, name)

        same = [c for c in plan.missing if c.condition.checkpoint == cell.condition.checkpoint]
        prompts = [text for c in same for story in c.work.stories for text in story.prompts]
        # The first seed's videos are kept, whichever device makes them.
        keep = folder / cells_lib.VIDEOS if cell.seed == cell.study.seeds[0] else None
        with _named(cell):
            cells_lib.run_cell(cell, pipelines.open(cell, prompts), advance=advance, keep=keep)


@contextlib.contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Puts the cell's name in front of a mistake that shows only now."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cell ({cell.name}): {error}") from error
