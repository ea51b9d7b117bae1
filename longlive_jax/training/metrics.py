"""What a run says about itself: lines of metrics, tensorboard scalars, a progress bar and a final report.

    <folder>/metrics.jsonl    one line per logged step, in full precision
    <folder>/tensorboard/     the same for TensorBoard, with a contact sheet per evaluation
    <folder>/samples/         what evaluations showed, see `training.samples`
    <folder>/report.json      settings, versions, numbers of compilations, timings and results

Only the first process writes.
"""

import collections
import importlib.metadata
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np

from longlive_jax import storage
from longlive_jax.training import samples

METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
_TOTAL = "total_seconds"

_LINE_EVERY = 15.0  # seconds between progress lines where there is no terminal
_WINDOW_STEPS = 60  # whole cycles where every second to sixth step updates the generator, too
_PAUSE_FACTOR = 10  # a step that takes so many times what most take was held up by something else
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

PEAK_FLOPS: Mapping[str, float] = {
    # NVIDIA's data sheets of the A100, H100 and H200 Tensor Core GPUs, without sparsity.
    "NVIDIA A100": 312e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    # Google Cloud's "TPU system architecture" pages, peak compute per chip (v5 lite is v5e, v6 lite v6e).
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
"""Dense bfloat16 operations per second of one device, by the beginning of its `device_kind`; the first
name that fits counts."""


class CompileCounter:
    """Counts the programs XLA compiles in this process, and the seconds that takes."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **unused: Any) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs


class Log:
    """Metrics of one run.

    Args:
      folder: the run's folder.
      first_step: step the run starts or resumes at; what was logged beyond it is dropped.
      steps: steps of the whole run.
      is_quiet: no progress on standard error.
      compiles: the counter of the run's programs: steps that compile are no measure of the others.
      started: `time.monotonic()` when this start of the run began; default now.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        first_step: int,
        steps: int,
        is_quiet: bool = False,
        compiles: CompileCounter | None = None,
        started: float | None = None,
    ) -> None:
        self._folder, self._steps = folder, steps
        self._writes = jax.process_index() == 0
        self._progress = _Progress(steps, is_quiet=is_quiet or not self._writes)
        self._rate = _Rate(compiles or CompileCounter())
        self._latest: dict[str, float] = {}
        self._started = time.monotonic() if started is None else started
        self._step, self._seconds_before = first_step, 0.0
        if self._writes:
            import tensorboardX  # half a second that help and tests of other parts need not pay

            folder.mkdir(parents=True, exist_ok=True)
            self._seconds_before = _truncate(folder / METRICS_FILE, first_step)
            self._lines = (folder / METRICS_FILE).open("a", encoding="utf-8")
            if self._seconds_before:  # what earlier starts took is not lost with the lines dropped
                self._write(first_step, {})
            self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def close(self) -> None:
        """Finishes the files."""
        self._progress.close()
        if self._writes:
            self._write(self._step, {})
            self._lines.close()
            self._board.close()

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        return dict(self._latest)

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds per step over the latest ones; None before there is one."""
        return self._rate.seconds

    @property
    def total_seconds(self) -> float:
        """Wall clock seconds of all starts of the run so far, as far as lines of metrics tell of them."""
        return self._seconds_before + time.monotonic() - self._started

    def begin(self) -> None:
        """A step begins: what happened since the one before (an evaluation, a checkpoint) is none of it."""
        self._rate.begin()

    def tick(self, step: int, frames: int) -> None:
        """Counts one step that saw `frames` video frames (over all processes)."""
        self._step = step
        self._rate.tick(frames)
        self._progress.show(step, self._latest, self._rate)

    def scalars(self, step: int, values: Mapping[str, float], *, flops: float | None = None) -> None:
        """Writes one line of metrics.

        Args:
          step: steps made.
          values: by name.
          flops: model operations per step over all devices, for the utilisation.
        """
        values = dict(values) | self._rate.metrics(flops)
        self._latest |= values
        if self._writes:
            self._write(step, values)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def samples(self, step: int, videos: np.ndarray, fps: int) -> None:
        """Keeps what an evaluation showed; the contact sheet goes to TensorBoard, too.

        Args:
          step: steps made.
          videos: float `[B, V, Y, X, 3]` in [-1, 1].
          fps: frames per second.
        """
        if self._writes:
            import PIL.Image

            sheet = samples.write(self._folder, step, videos, fps=fps)
            # Not `add_video`, which needs a package of its own for the GIF it makes.
            self._board.add_image("samples", np.asarray(PIL.Image.open(sheet)), step, dataformats="HWC")

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **values, _TOTAL: self.total_seconds}
        print(json.dumps(line), file=self._lines, flush=True)

    def note(self, text: str) -> None:
        """Says something beside the progress bar."""
        self._progress.note(text)

    def report(self, values: Mapping[str, Any]) -> None:
        """Writes the final report."""
        if self._writes:
            storage.write_json(self._folder / REPORT_FILE, values)


def environment() -> dict[str, Any]:
    """Versions and devices, for a report."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        **{
            name: importlib.metadata.version(name)
            for name in ("longlive-jax", *_PACKAGES)
            if _installed(name)
        },
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def peak_flops(kind: str | None = None, *, devices: int | None = None) -> float | None:
    """Peak operations per second of all devices together; None where it is not known.

    Args:
      kind: a `device_kind`; default the devices' own.
      devices: how many; default all of all processes.
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    found = [peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    return found[0] * (jax.device_count() if devices is None else devices) if found else None


class _Rate:
    """Seconds and frames of the latest steps, as sums: steps may be of several kinds, as in a distillation.

    Steps that compiled a program, and those held up by something else, are left out.
    """

    def __init__(self, compiles: CompileCounter) -> None:
        self._compiles = compiles
        self._steps: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW_STEPS)
        self.begin()

    def begin(self) -> None:
        self._since, self._compiled = time.monotonic(), self._compiles.count

    def tick(self, frames: int) -> None:
        before, compiled = self._since, self._compiled
        self.begin()
        if self._compiled == compiled:
            self._steps.append((self._since - before, frames))

    def _sums(self) -> tuple[float, int, int]:
        """Seconds, frames and number of the steps that count."""
        if not self._steps:
            return 0.0, 0, 0
        # Not of the median: where every other step waits for both, half of them take next to nothing.
        longest = _PAUSE_FACTOR * sorted(seconds for seconds, _ in self._steps)[3 * len(self._steps) // 4]
        kept = [step for step in self._steps if step[0] <= longest]
        return sum(seconds for seconds, _ in kept), sum(frames for _, frames in kept), len(kept)

    @property
    def seconds(self) -> float | None:
        """Mean seconds per step; None before there is one."""
        seconds, _, count = self._sums()
        return seconds / count if count else None

    def metrics(self, flops: float | None) -> dict[str, float]:
        seconds, frames, count = self._sums()
        if not seconds:
            return {}
        values = {"seconds_per_step": seconds / count}
        if frames:
            values["frames_per_second"] = frames / seconds
        peak = peak_flops()
        if flops is not None and peak is not None:
            values["utilisation"] = flops * count / seconds / peak
        return values


class _Progress:
    """A bar on a terminal, a line now and then in a log."""

    def __init__(self, steps: int, *, is_quiet: bool) -> None:
        self._steps, self._is_quiet = steps, is_quiet
        self._last_line = 0.0
        self._bar: Any = None
        if not is_quiet and sys.stderr.isatty():
            import rich.console
            import rich.progress as rp

            columns = (rp.TextColumn("{task.completed}/{task.total}"), rp.BarColumn())
            detail = rp.TextColumn("{task.description}", markup=False)
            self._bar = rp.Progress(*columns, detail, console=rich.console.Console(stderr=True))
            self._task = self._bar.add_task("compiling", total=steps)
            self._bar.start()

    def show(self, step: int, latest: Mapping[str, float], rate: _Rate) -> None:
        if self._is_quiet:
            return
        seconds = rate.seconds
        parts = [f"loss {latest['loss']:.4g}"] if "loss" in latest else []
        if seconds is not None:
            minutes, rest = divmod(round((self._steps - step) * seconds), 60)
            parts += [f"{seconds:.3g} s/step", f"{minutes}:{rest:02d} left"]
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            print(f"{step}/{self._steps}  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._is_quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _truncate(file: pathlib.Path, step: int) -> float:
    """Drops the lines beyond `step`: they are computed again (the last may be cut off, too).

    Returns:
      The wall clock seconds that all lines tell of, dropped ones included.
    """
    if not file.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        seconds = max(seconds, entry.get(_TOTAL, 0.0))
        if entry["step"] <= step:
            kept.append(line)
    temporary = file.with_suffix(".part")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(file)
    return seconds


def as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Device scalars as Python floats (nan and inf included)."""
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}


def losses(values: Mapping[str, float]) -> dict[str, float]:
    """What is minimised, by name: "loss", and that of a second network, as "generator_loss"."""
    return {name: value for name, value in values.items() if name == "loss" or name.endswith("_loss")}


def is_finite(values: Mapping[str, float]) -> bool:
    """Whether losses and gradient norms are numbers."""
    watched = losses(values) | {name: value for name, value in values.items() if "grad_norm" in name}
    return all(math.isfinite(value) for value in watched.values())


def say(text: str, *, file: TextIO | None = None) -> None:
    """Tells the person at the terminal, once, whatever the number of processes; default standard error."""
    if jax.process_index() == 0:
        print(text, file=file or sys.stderr, flush=True)
