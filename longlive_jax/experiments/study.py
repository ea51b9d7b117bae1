"""What a study is: a grid of conditions, what they generate, and what is measured of it.

    def get_config() -> Study:
        return Study(
            name="window",
            question="How long a window does consistency need?",
            task=Scenes(frames=42),
            grids=({"window": (6, 12, 24), "sink": (0, 3)},),
            metrics=("adherence",),
            columns=("all", "identity.size"),
        )

A condition is one point of the grids. All conditions see the same prompts and the same noise, so that
they can be compared clip by clip.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longlive_jax import config_module
from longlive_jax.config import PipelineConfig, even_steps
from longlive_jax.config_dict import override, to_dict
from longlive_jax.errors import UserError, require
from longlive_jax.experiments.tasks import SEED_STRIDE, Task

MAX_SEED = 40_000
"""Seeds are below this: each one owns `SEED_STRIDE` seeds of noise below 2**32."""

TIME = "time"
"""The x of a plot whose measure goes along the video."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """One point of a study's grids.

    Attributes:
      values: axis to value, as the grid has them.
      checkpoint: directory of the weights, or the name of a bundled checkpoint.
      settings: dotted overrides of the checkpoint's config.
      use_lora: whether a LoRA that the checkpoint keeps apart is added.
    """

    values: Mapping[str, Any]
    checkpoint: str
    settings: Mapping[str, Any]
    use_lora: bool = True

    @property
    def label(self) -> str:
        """What it is called, e.g. "window 12, sink 3"."""
        return (
            ", ".join(f"{name} {value_text(value)}" for name, value in self.values.items()) or "as configured"
        )

    def resolve(self, config: PipelineConfig) -> PipelineConfig:
        """The config it generates with.

        Args:
          config: the checkpoint's.

        Raises:
          UserError: the settings do not fit, with the condition's name in front.
        """
        try:
            return override(config, self.settings)
        except UserError as error:
            raise UserError(f"condition ({self.label}): {error}") from error


def value_text(value: Any) -> str:
    """A value of an axis as it is shown: on and off, numbers without zeros behind."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- axes -------------------------------------------------------------------------------------------

Axis = Callable[[Condition, Any], Condition]
"""What a value of an axis changes of a condition."""


def _setting(name: str) -> Axis:
    """An axis that is a setting of the config."""

    def apply(condition: Condition, value: Any) -> Condition:
        return dataclasses.replace(condition, settings={**condition.settings, name: value})

    return apply


def _steps(name: str) -> Axis:
    """Evenly spread denoising steps from their number; a sequence is taken as it is."""

    def apply(condition: Condition, value: Any) -> Condition:
        if isinstance(value, int) and not isinstance(value, bool):
            require(1 <= value <= 1000, f"{name}={value} must be in [1, 1000]")
            value = even_steps(value)
        return _setting(f"sampler.{name}")(condition, value)

    return apply


def _lora(condition: Condition, value: Any) -> Condition:
    require(isinstance(value, bool), f"lora={value!r} must be true or false")
    return dataclasses.replace(condition, use_lora=value)


AXES: Mapping[str, Axis] = {
    "window": _setting("window.window_frames"),
    "sink": _setting("window.sink_frames"),
    "block": _setting("window.block_frames"),
    "rope": _setting("window.rope"),
    "steps": _steps("steps"),
    "opening_steps": _steps("opening_steps"),
    "shift": _setting("sampler.shift"),
    "policy": _setting("switch.policy"),
    "keep_sink": _setting("switch.keep_sink"),
    "dtype": _setting("dtype"),
    "quantization": _setting("quantization"),
    "cache_dtype": _setting("cache_dtype"),
    "lora": _lora,
}
"""Short names of axes. A dotted name of the config is an axis without being listed; `checkpoint` is one
whose values are names of `Study.checkpoints`, or directories."""


# --- the study --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
      name: of its files.
      measure: what is drawn.
      x: the axis along the figure, or `TIME` for a measure that goes along the video.
      by: axes that make lines of their own; other axes are averaged over nothing: each of their values
        has to be told apart by `x` and `by`.
      label: of the vertical axis; default the measure.
    """

    name: str
    measure: str
    x: str
    by: tuple[str, ...] = ()
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, on what, and how it is measured.

    Attributes:
      name: of its folder.
      question: what it asks, one sentence.
      task: which prompts, how long.
      grids: each is axis to values and stands for all their combinations; the study has those of all.
      metrics: names of `metrics.METRICS`.
      columns: measures that the report's table shows.
      plots: figures.
      checkpoint: weights where the grid does not say: a directory, or the name of a bundled checkpoint.
      checkpoints: name to directory, for the axis `checkpoint`.
      settings: dotted overrides that hold for every condition.
      seeds: each draws prompts and noise of its own.
      clips: videos per condition and seed.
      batch: videos made side by side; divides `clips`, so that every program is compiled once.
      baseline: the condition that the others are compared with, by its axes; empty takes the first.
      kept_videos: videos per condition that are kept for the HTML report.
      models: metric to the directory (or hub name) of the network it measures with.
      paper: what the paper reports on the same question.
    """

    name: str
    question: str
    task: Task
    grids: tuple[Mapping[str, Sequence[Any]], ...]
    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    plots: tuple[Plot, ...] = ()
    checkpoint: str = "toy"
    checkpoints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (101, 102, 103)
    clips: int = 32
    batch: int = 16
    baseline: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept_videos: int = 2
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paper: str = ""

    def __post_init__(self) -> None:
        from longlive_jax.experiments.metrics import METRICS

        require(re.fullmatch(r"[\w-]+", self.name) is not None, f"name={self.name!r} must be a folder's name")
        require(0 < self.clips <= SEED_STRIDE, f"clips={self.clips} must be in [1, {SEED_STRIDE}]")
        require(
            self.batch > 0 and self.clips % self.batch == 0,
            f"batch={self.batch} must divide clips={self.clips}, so that every batch has one shape",
        )
        require(
            len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds),
            f"seeds={self.seeds} must differ, and there must be one",
        )
        require(
            all(0 <= seed < MAX_SEED for seed in self.seeds),
            f"seeds={self.seeds} must be in [0, {MAX_SEED})",
        )
        require(len(self.metrics) > 0, f"metrics is empty; choose from {', '.join(METRICS)}")
        for name in self.metrics:
            require(name in METRICS, f"metrics: {name!r} is unknown; choose from {', '.join(METRICS)}")
            metric, kind = METRICS[name], type(self.task).__name__
            kinds = ", ".join(task.__name__ for task in metric.tasks)
            require(
                not metric.tasks or isinstance(self.task, metric.tasks),
                f"metrics: {name} is for the task {kinds}, not for {kind}",
            )
            require(
                not metric.needs_model or name in self.models,
                f"metrics: {name} needs a network; name its directory in models={{{name!r}: ...}}",
            )
        require(self.kept_videos >= 0, f"kept_videos={self.kept_videos} must be 0 or more")
        conditions = self.conditions()
        found = [c for c in conditions if self._is_baseline(c)]
        require(len(found) > 0, f"baseline={dict(self.baseline)} is not one of the study's conditions")
        for plot in self.plots:
            known = {TIME, *(axis for condition in conditions for axis in condition.values)}
            for axis in (plot.x, *plot.by):
                require(
                    axis in known, f"plots: {plot.name} has no axis {axis!r}; there are {', '.join(known)}"
                )

    def conditions(self) -> list[Condition]:
        """Every condition once, in the order of the grids.

        Raises:
          UserError: an axis is unknown or has no values.
        """
        found: dict[str, Condition] = {}
        for grid in self.grids:
            for name, values in grid.items():
                require(len(values) > 0, f"grids: {name} has no values")
            for point in itertools.product(*grid.values()):
                condition = self._condition(dict(zip(grid, point, strict=True)))
                found.setdefault(condition.label, condition)
        require(len(found) > 0, "grids is empty; give at least one grid of axes")
        return list(found.values())

    def _condition(self, values: Mapping[str, Any]) -> Condition:
        condition = Condition(values, self.checkpoint, self.settings)
        for name, value in values.items():
            if name == "checkpoint":
                place = self.checkpoints.get(value, value)
                condition = dataclasses.replace(condition, checkpoint=place)
                continue
            require(
                name in AXES or "." in name,
                f"grids: {name!r} is not an axis; choose from checkpoint, {', '.join(AXES)} or a dotted "
                "setting of the config",
            )
            condition = AXES.get(name, _setting(name))(condition, value)
        return condition

    def _is_baseline(self, condition: Condition) -> bool:
        return all(condition.values.get(name) == value for name, value in self.baseline.items())

    @property
    def baseline_label(self) -> str:
        """The label of the condition that the others are compared with."""
        return next(c.label for c in self.conditions() if self._is_baseline(c))


_TABLES = ("grids", "plots", "checkpoints", "settings", "baseline", "models")


def describe(study: Study) -> dict[str, Any]:
    """A JSON-ready copy."""
    values = to_dict(study)
    return {**values, "task": {"kind": type(study.task).__name__, **to_dict(study.task)}}


def load_study(
    path: str | pathlib.Path,
    changes: Mapping[str, Any] | None = None,
    *,
    checkpoints: Mapping[str, str] | None = None,
) -> Study:
    """Reads a study's config file and applies dotted overrides.

    Args:
      path: a Python file that defines `get_config()`.
      changes: dotted names to values, e.g. `{"clips": 8, "task.frames": 21}`.
      checkpoints: name to directory, in place of those the file names for the axis `checkpoint`.

    Raises:
      UserError: the file, what it returns or a change is not usable.
    """
    study = config_module.load(path, Study, example="experiments/window_sink/config.py")
    for name in changes or {}:
        section = name.partition(".")[0]
        require(
            section not in _TABLES, f"{name}: {section} is a table; change it in {path}, or in a copy of it"
        )
    unknown = set(checkpoints or {}) - set(study.checkpoints)
    require(
        not unknown,
        f"--checkpoint {', '.join(sorted(unknown))}: the study names "
        f"{', '.join(study.checkpoints) or 'none'}; "
        "the others take checkpoint=DIR",
    )
    study = dataclasses.replace(study, checkpoints={**study.checkpoints, **(checkpoints or {})})
    return override(study, changes or {})
