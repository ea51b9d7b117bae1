"""From stored cells to a table: one row per condition, measure and window, with intervals, and differences.

A seed draws its own prompts and its own noise, so the clips of all seeds are independent, and the interval of
a mean is over all of them (`toy.evaluation.estimate`). Measures that belong to a run, not to a clip (speed,
memory), have one value per seed and Student's interval over the seeds. Conditions see the same clips, so
their differences are taken clip by clip.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longlive_jax import storage
from longlive_jax.experiments import store
from longlive_jax.experiments.cells import Cell
from longlive_jax.experiments.metrics import PER_RUN
from longlive_jax.experiments.study import Study
from longlive_jax.toy import evaluation

CSV_FILE = "table.csv"
JSONL_FILE = "table.jsonl"

# Two-sided 95% quantiles of Student's distribution by degrees of freedom; beyond, those of the normal.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.960


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of the table.

    Attributes:
      condition: label of the condition.
      axes: its axes and values.
      measure: what was measured.
      window: index along the video; None where the measure does not go along it.
      mean: over all clips of all seeds to which the measure applies; None where it applies to none.
      low: lower end of the 95% interval.
      high: upper end.
      clips: how many clips (runs, for the measures of a run).
      seeds: how many seeds.
    """

    condition: str
    axes: Mapping[str, Any]
    measure: str
    window: int | None
    mean: float | None
    low: float | None
    high: float | None
    clips: int
    seeds: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A condition against the baseline, clip by clip.

    Attributes:
      condition: label.
      measure: what was measured.
      difference: mean of condition minus baseline; None where no clip has both.
      low: lower end of its 95% interval.
      high: upper end.
      differs: whether the interval excludes 0 and there are enough clips to say so.
      clips: pairs.
    """

    condition: str
    measure: str
    difference: float | None
    low: float | None
    high: float | None
    differs: bool
    clips: int


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything a report shows.

    Attributes:
      study: what was asked.
      rows: the table.
      differences: from the baseline, for the study's columns.
      configs: condition to its resolved config.
      prompts: of the videos that are kept, each a list of the prompts of its story.
      seconds: of all cells.
    """

    study: Study
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    configs: Mapping[str, Mapping[str, Any]]
    prompts: Sequence[Sequence[str]]
    seconds: float

    def find(self, condition: str, measure: str) -> list[Row]:
        """The rows of a condition's measure, in the order of the windows."""
        return [row for row in self.rows if (row.condition, row.measure) == (condition, measure)]


def collect(study: Study, cells: Sequence[Cell]) -> Result:
    """Reads the stored cells of a study.

    Args:
      study: the study.
      cells: all of them, stored.
    """
    by_condition: dict[str, list[Cell]] = {}
    for cell in cells:
        by_condition.setdefault(cell.condition.label, []).append(cell)
    rows: list[Row] = []
    tables, configs, seconds = {}, {}, 0.0
    prompts: Sequence[Sequence[str]] = ()
    for label, own in by_condition.items():
        stored = [store.read(cell.file) for cell in own]
        tables[label] = {
            name: np.concatenate([one.table[name] for one in stored]) for name in stored[0].table
        }
        configs[label], seconds = stored[0].config, seconds + sum(one.seconds for one in stored)
        prompts = prompts or stored[0].prompts
        for name in stored[0].table:
            rows += _rows(own[0], name, [one.table[name] for one in stored])
    baseline = study.baseline_label
    differences = [
        _difference(label, name, tables[label][name], tables[baseline][name])
        for label in tables
        if label != baseline
        for name in study.columns
        if name in tables[label] and name in tables[baseline] and tables[label][name].ndim == 1
    ]
    return Result(study, tuple(rows), tuple(differences), configs, prompts, seconds)


def _rows(cell: Cell, name: str, per_seed: Sequence[np.ndarray]) -> list[Row]:
    """One row, or one per window."""
    values = np.concatenate(per_seed)
    if name in PER_RUN:
        values = np.array([np.mean(one) for one in per_seed])
        mean, low, high, counts = _student(values)
    else:
        found = evaluation.estimate(values)
        mean, low, high, counts = found.mean, found.low, found.high, found.clips
    windows: list[int | None] = [None] if np.ndim(mean) == 0 else list(range(len(mean)))
    return [
        Row(
            condition=cell.condition.label,
            axes=cell.condition.values,
            measure=name,
            window=window,
            mean=_number(_at(mean, window)),
            low=_number(_at(low, window)),
            high=_number(_at(high, window)),
            clips=int(_at(counts, window)),
            seeds=len(per_seed),
        )
        for window in windows
    ]


def _at(values: Any, window: int | None) -> Any:
    return values if window is None else values[window]


def _number(value: Any) -> float | None:
    result: float | None = store.plain(np.float64(value), digits=6)
    return result


def _student(values: np.ndarray) -> tuple[Any, Any, Any, Any]:
    """Mean, ends of Student's 95% interval (not numbers for one value) and count."""
    count = len(values)
    if count < 2:
        return values[0], np.nan, np.nan, count
    quantile = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
    half = quantile * values.std(ddof=1) / count**0.5
    return values.mean(), values.mean() - half, values.mean() + half, count


def _difference(label: str, name: str, values: np.ndarray, baseline: np.ndarray) -> Difference:
    found = evaluation.compare(values, baseline)
    return Difference(
        condition=label,
        measure=name,
        difference=_number(found.difference),
        low=_number(found.low),
        high=_number(found.high),
        differs=found.differs and name not in PER_RUN,
        clips=found.clips,
    )


# --- files ------------------------------------------------------------------------------------------


def write(result: Result, folder: pathlib.Path) -> None:
    """Writes the table as CSV and JSON lines."""
    records = [_record(row, _axes(result.rows)) for row in result.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    for name, content in ((CSV_FILE, text.getvalue()), (JSONL_FILE, "\n".join(lines) + "\n")):
        with storage.new_file(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _axes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(axis for row in rows for axis in row.axes))


def _record(row: Row, axes: Sequence[str]) -> dict[str, Any]:
    values = {name: row.axes.get(name) for name in axes}
    numbers = {n: getattr(row, n) for n in ("measure", "window", "mean", "low", "high", "clips", "seeds")}
    return {"condition": row.condition, **values, **numbers}
