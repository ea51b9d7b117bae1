"""The shared part of every stage's loop: start or resume, count steps, look after what can go wrong.

    with TrainingRun(config, resume=..., ) as run:
        state = run.start(state, data)
        for step in run.steps():
            state, metrics = train_step(state, next(data))
            run.after(step, state, metrics, frames=...)
            if run.is_evaluation_due(step):
                run.evaluated(step, *evaluate(state))
            if run.is_early_export_due(step):
                run.exported(step, export(state))
        run.finish(export=export(state))

A signal (Ctrl-C, SIGTERM) to any process ends the loop after the step under way, with a checkpoint (of
several processes, all after the next one); before the first step is made there is nothing to save, and it
ends the run at once. A loss that is not a number, or stays far above what it was, ends it without a
checkpoint: the last good one stays.
"""

import collections
import contextlib
import pathlib
import signal
import statistics
import threading
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from longlive_jax import sharding, storage
from longlive_jax.checkpoint import open_checkpoint
from longlive_jax.errors import UserError, require
from longlive_jax.training import export as export_lib
from longlive_jax.training import metrics as metrics_lib
from longlive_jax.training import processes
from longlive_jax.training.checkpoint import Checkpoints, has_checkpoints
from longlive_jax.training.config import Training
from longlive_jax.training.config_file import to_json
from longlive_jax.training.lock import RunLock

CONFIG_FILE = "config.json"
EXPORTS_FOLDER = "exports"

Resume = Literal["never", "auto"]
"""Whether a run that its folder already holds is continued, or refused."""

HISTORY_STEPS = 200
"""Latest steps that the usual loss is the median of."""

DIVERGED_STEPS = 50
"""Steps in a row after which too high a loss ends the run; none is judged before there are as many."""

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818  (it is no error)
    """A signal ended the run.

    Args:
      number: the signal's.
      where: what had been made by then, and what is saved of it.
      saved: step of the newest checkpoint; None if there is none.

    Attributes:
      status: exit status, 128 + the signal's number.
    """

    def __init__(self, number: int, where: str, *, saved: int | None) -> None:
        onward = f"--resume auto goes on from step {saved}" if saved else "the same command starts it again"
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; {onward}")
        self.status = 128 + number


class TrainingError(Exception):
    """The loss is no number, or diverged; the last good checkpoint is kept."""


class TrainingRun:
    """One run of one stage.

    Args:
      config: the stage's config.
      resume: "auto" continues a run the folder holds; "never" refuses it.
      is_quiet: no progress on standard error.

    Attributes:
      flops: model operations per step over all devices; set by a stage that knows them.
    """

    def __init__(self, config: Training, *, resume: Resume = "never", is_quiet: bool = False) -> None:
        self.config = config
        self.flops: float | None = None
        self._resume, self._is_quiet = resume, is_quiet
        self._folder = pathlib.Path(config.run.folder)
        self._stack = contextlib.ExitStack()
        self._signal = _Signal()
        self._vote = processes.Vote() if jax.process_count() > 1 else None
        self._watch = _Watch(config.run.diverged_factor)
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._scores: dict[str, float] = {}
        self._first = self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> "TrainingRun":
        with self._stack as stack:  # what is open is closed again if the rest fails
            stack.enter_context(RunLock(self._folder))
            exists = has_checkpoints(self._folder)
            require(
                not exists or self._resume == "auto",
                f"run.folder={self._folder} already holds a run; continue it with --resume auto, or name "
                "another",
            )
            self.compiles = stack.enter_context(metrics_lib.CompileCounter())
            self.checkpoints = stack.enter_context(Checkpoints(self.config))
            latest = self.checkpoints.latest
            if exists and latest is not None:
                self.checkpoints.check(latest)
                require(
                    latest <= self.config.run.steps,
                    f"run.steps={self.config.run.steps} is less than the {latest} steps that run.folder="
                    f"{self._folder} has made; give at least as many",
                )
            if jax.process_index() == 0:
                storage.write_json(self._folder / CONFIG_FILE, to_json(self.config))
            stack.enter_context(self._signal)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        saved = self.checkpoints.latest
        self._stack.__exit__(*error)
        # Of several processes only this one knows: it goes as one that failed does, and ends the others.
        number = self._signal.number if self._signal.is_early and jax.process_count() == 1 else None
        if number is not None and error[0] is KeyboardInterrupt:
            raise Interrupted(number, "before a step was made", saved=saved)

    # --- the loop -----------------------------------------------------------------------------------

    def start(self, state: T, data: Any) -> T:
        """Returns the state to begin with: the newest checkpoint's, or `state` as it is.

        Args:
          state: a fresh state, already where it belongs.
          data: the iterator; moved to where the checkpoint left it.
        """
        if self.checkpoints.latest is not None:
            self._first = self.checkpoints.latest
            state = self.checkpoints.restore(state, data)
            self._scores = self.checkpoints.scores(self._first)
        self._done = self._first
        self.log = metrics_lib.Log(
            self._folder,
            first_step=self._first,
            steps=self.config.run.steps,
            is_quiet=self._is_quiet,
            compiles=self.compiles,
            started=self._started,
        )
        self._stack.callback(self.log.close)
        if self._first:
            self.log.note(f"resumed at step {self._first} of {self.config.run.steps}")
        self._data = data
        return state

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to make, 1 for the first.

        Raises:
          Interrupted: a signal came; the state of the last step has been saved, or it says why not.
          TrainingError: see the class.
        """
        for step in range(self._first + 1, self.config.run.steps + 1):
            self.log.begin()
            yield step
            number = self._signal_number()
            if number:
                self._flush()
                unsaved = self._save()
                self.checkpoints.wait()
                raise Interrupted(
                    number, f"after step {step}{unsaved and f', {unsaved}'}", saved=self.checkpoints.latest
                )
        self._flush()

    def after(self, step: int, state: Any, metrics: Mapping[str, Any], *, frames: int) -> None:
        """Logs and saves after a step.

        The metrics are read one step late, so that the device is never waited for.

        Args:
          step: its number.
          state: the state after it.
          metrics: device scalars; losses and gradient norms are watched, see `metrics.losses`.
          frames: video frames the step saw, over all processes.
        """
        self._signal.is_early = False
        self._flush()
        self._pending, self._state, self._done = (step, metrics), state, step
        is_checkpoint_due = step % self.config.run.checkpoint_every == 0
        if is_checkpoint_due or self.is_evaluation_due(step) or self.is_early_export_due(step):
            self._flush()  # these wait for the step, which would not count as its time
        self.log.tick(step, frames)
        if is_checkpoint_due and not self.is_evaluation_due(step):
            self._note_unsaved(self._save())

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the state after this step should be evaluated."""
        every, last = self.config.run.eval_every, self.config.run.steps
        return step == last or (every > 0 and step % every == 0)

    def is_early_export_due(self, step: int) -> bool:
        """Whether the state after this step should be exported, before the one after the last.

        The last state is exported behind the loop: a run that was killed between its last checkpoint and
        its export has no step to make, but its export.
        """
        every = self.config.run.export_every
        return every > 0 and step % every == 0 and step < self.config.run.steps

    def exported(self, step: int, path: pathlib.Path) -> None:
        """Writes its step into an export; keeps a copy under that number where `run.keep_exports` asks."""
        if jax.process_index() != 0:
            return
        export_lib.record_steps(path, step)
        if not self.config.run.keep_exports:
            return
        kept = pathlib.Path(self.config.run.folder) / EXPORTS_FOLDER / f"{step:06d}"
        with storage.new_folder(kept, overwrite=True, replaceable=lambda _: True) as folder:
            for file in path.iterdir():
                storage.copy_file(file, folder / file.name)

    def evaluated(self, step: int, scores: Mapping[str, float], videos: np.ndarray | None = None) -> None:
        """Logs the results of an evaluation and saves the state with them.

        Args:
          step: updates made.
          scores: results by name.
          videos: what they were computed from, float `[B, V, Y, X, 3]` in [-1, 1]; a handful is kept in
            the run's folder.
        """
        self._flush()
        self._scores = dict(scores)
        self.log.scalars(step, {f"eval/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.log.note(f"step {step}: {shown}")
        known = {**self.log.latest, **scores}
        self._note_unsaved(
            self._save({self.config.evaluation.metric: known[self.config.evaluation.metric], **scores})
        )
        if videos is not None:
            self.log.samples(step, videos, self.config.model.video.fps)

    def finish(self, *, export: pathlib.Path) -> dict[str, Any]:
        """Writes the report of a finished run, whose last state is exported, and returns it."""
        self.exported(self._done, export)
        self.checkpoints.wait()
        report = {
            **to_json(self.config),
            "steps": self._done,
            "resumed_at": self._first,
            "seconds": time.monotonic() - self._started,
            "total_seconds": self.log.total_seconds,
            "seconds_per_step": self.log.step_seconds,
            "compilations": self.compiles.count,
            "compile_seconds": self.compiles.seconds,
            "metrics": self.log.latest,
            "scores": self._scores,
            "best_step": self.checkpoints.best,
            "environment": metrics_lib.environment(),
            "export": str(export),
        }
        self.log.report(report)
        return report

    # --- inside -------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Reads, checks and logs the metrics of the step before."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        run = self.config.run
        numbers = metrics_lib.as_floats(values)
        problem = self._watch.problem(numbers)
        if problem:
            kept = self.checkpoints.latest
            raise TrainingError(
                f"step {step}: {problem}; "
                + (
                    f"the checkpoint of step {kept} is the last good state"
                    if kept
                    else "nothing was saved yet"
                )
                + "; a lower optimizer.learning_rate or optimizer.clip_norm may help"
            )
        if step % run.log_every == 0 or step == run.steps:
            self.log.scalars(step, numbers | {"compilations": self.compiles.count}, flops=self.flops)

    def _save(self, scores: Mapping[str, float] | None = None) -> str:
        """Saves the state after the last step; returns why it did not, "" if it did."""
        high = self._watch.high
        if high:  # it may be diverging: the checkpoint there is shall stay the newest
            return f"which is not saved ({high}: it may be diverging)"
        self.checkpoints.save(self._done, self._state, self._data, scores)
        return ""

    def _note_unsaved(self, unsaved: str) -> None:
        if unsaved:
            kept = self.checkpoints.latest
            newest = (
                "nothing has been saved yet" if kept is None else f"the newest checkpoint is of step {kept}"
            )
            self.log.note(f"step {self._done}, {unsaved}; {newest}")

    def _signal_number(self) -> int:
        """The signal that ends the run now, 0 for none; all processes agree, as all of them save."""
        own = self._signal.number or 0
        return own if self._vote is None else self._vote.cast(own)


class _Signal:
    """Remembers the first SIGINT or SIGTERM instead of being cut off by it, unless it comes early.

    Attributes:
      number: of the signal that came; None for none.
      is_early: whether no step has been made, so that there is nothing to wait for.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_early = True
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Signal":
        # Python delivers signals to the main thread only, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        is_first, self.number = self.number is None, number
        if self.is_early or not is_first:  # the second one does not wait
            raise KeyboardInterrupt


class _Watch:
    """Notices a loss that is no number, or has left where it was; each of several by its own past."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._recent: dict[str, collections.deque[float]] = {}
        self._count: collections.Counter[str] = collections.Counter()
        self._high: dict[str, str] = {}

    @property
    def high(self) -> str:
        """Which losses were far above the usual when they were last seen, and how far; "" for none."""
        return " and ".join(self._high.values())

    def problem(self, values: Mapping[str, float]) -> str | None:
        """What is wrong with a step's numbers; None if nothing is."""
        if not metrics_lib.is_finite(values):
            bad = [
                f"{name} {value}"
                for name, value in values.items()
                if not metrics_lib.is_finite({name: value})
            ]
            return f"the training produced numbers that are not finite ({', '.join(bad)})"
        for name, loss in metrics_lib.losses(values).items():
            recent = self._recent.setdefault(name, collections.deque(maxlen=HISTORY_STEPS))
            usual = statistics.median(recent) if len(recent) >= DIVERGED_STEPS else None
            if usual is None or loss <= self._factor * abs(usual):
                self._count[name] = 0
                self._high.pop(name, None)
                recent.append(loss)
                continue
            self._count[name] += 1
            self._high[name] = f"its {name} is {loss:.4g}, the usual one {usual:.4g}"
            if self._count[name] >= DIVERGED_STEPS:
                return f"the {name} diverged ({loss:.4g} for {self._count[name]} steps, {usual:.4g} before)"
        return None


def make_mesh(config: Training) -> jax.sharding.Mesh:
    """The mesh of a config.

    Raises:
      UserError: it does not fit the devices, or they do not divide the batch.
    """
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    parts = mesh.size * config.run.micro_batches
    require(
        config.data.batch_size % parts == 0,
        f"data.batch_size={config.data.batch_size} must be a multiple of {parts}: {mesh.size} devices times "
        f"run.micro_batches={config.run.micro_batches}",
    )
    return mesh


def check_base(config: Training, *parts: str) -> None:
    """Refuses a config whose `base` does not hold the parts the stage needs."""
    if not config.base:
        raise UserError(f"base is empty; name the checkpoint directory that holds {', '.join(parts)}")
    opened = open_checkpoint(config.base, field="base")
    missing = [part for part in parts if part not in opened.parts]
    require(not missing, f"base={config.base} has no {', '.join(missing)}; train or convert it first")
