"""The scorer's result files, and the totals that VBench's leaderboard and the paper report.

Normalisation: every dimension is mapped from [low, high] to [0, 1]; the quality score is the mean of its
seven dimensions, with dynamic degree at half weight, the semantic score the mean of its nine, and the
total has four parts quality and one part semantic. Source: `scripts/constant.py` and
`scripts/cal_final_score.py` of github.com/Vchitect/VBench.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longlive_jax import storage
from longlive_jax.errors import require
from longlive_jax.experiments.vbench.prompts import DIMENSIONS, QUALITY, SEMANTIC

RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(DIMENSIONS, (0.0, 1.0)),
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""What a raw score is mapped from."""

WEIGHTS: Mapping[str, float] = {**dict.fromkeys(DIMENSIONS, 1.0), "dynamic_degree": 0.5}

_QUALITY_PARTS, _SEMANTIC_PARTS = 4, 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a VBench table; scores in percent.

    Attributes:
      name: the model.
      total: four parts quality, one part semantic.
      quality: of the seven quality dimensions.
      semantic: of the nine semantic dimensions.
    """

    name: str
    total: float | None
    quality: float | None
    semantic: float | None


SHORT: Sequence[Row] = (
    Row("LTX-Video", 80.00, 82.30, 70.79),
    Row("Wan2.1-1.3B", 84.26, 85.30, 80.09),
    Row("SkyReels-V2", 82.67, 84.70, 74.53),
    Row("MAGI-1", 79.18, 82.04, 67.74),
    Row("CausVid", 81.20, 84.05, 69.80),
    Row("NOVA", 80.12, 80.39, 79.05),
    Row("Pyramid Flow", 81.72, 84.74, 69.62),
    Row("Self-Forcing, chunk-wise", 84.31, 85.07, 81.28),
    Row("Self-Forcing, frame-wise", 84.26, 85.25, 80.30),
    Row("LongLive (paper)", 84.87, 86.97, 76.47),
)
"""The paper's table of 5 s videos on VBench."""

LONG: Sequence[Row] = (
    Row("SkyReels-V2", 75.29, 80.77, 53.37),
    Row("FramePack", 81.95, 83.61, 75.32),
    Row("Self-Forcing", 81.59, 83.82, 72.70),
    Row("LongLive (paper)", 83.52, 85.44, 75.82),
)
"""The paper's table of 30 s videos on VBench-Long."""


def read_results(paths: Iterable[str | pathlib.Path]) -> dict[str, float]:
    """Raw scores by dimension, from the scorer's `*_eval_results.json`.

    Args:
      paths: the files, or folders that hold them.

    Raises:
      UserError: a file is something else, or two files have different scores of one dimension.
    """
    found: dict[str, float] = {}
    origin: dict[str, pathlib.Path] = {}
    for file in _files(paths):
        for name, value in storage.read_json(file).items():
            dimension = name.replace(" ", "_")
            require(dimension in DIMENSIONS, f"{file}: {name!r} is not a dimension of VBench")
            score = value[0] if isinstance(value, list) and value else value
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            require(is_number, f"{file}: {name} has the score {score!r}, which is no number")
            require(
                0 <= score <= 1, f"{file}: {name}={score} must be in [0, 1]; it is scored by another version"
            )
            require(
                found.get(dimension, score) == score,
                f"{file}: {dimension}={score}, but {origin.get(dimension)} says {found.get(dimension)}",
            )
            found[dimension], origin[dimension] = float(score), file
    require(bool(found), "no results: give the *_eval_results.json of the scorer, or the folder they are in")
    return found


def _files(paths: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        files += sorted(path.rglob("*_eval_results.json")) if path.is_dir() else [path]
    return files


def normalised(raw: Mapping[str, float]) -> dict[str, float]:
    """Scores in [0, 1] by dimension; a model can be outside the range that the benchmark found."""
    return {name: (raw[name] - RANGES[name][0]) / (RANGES[name][1] - RANGES[name][0]) for name in raw}


def row(name: str, raw: Mapping[str, float]) -> Row:
    """Quality, semantic and total, in percent; None where a dimension is missing.

    Args:
      name: of the model.
      raw: scores by dimension, as the scorer writes them.
    """
    values = normalised(raw)

    def mean(names: Sequence[str]) -> float | None:
        if any(one not in values for one in names):
            return None
        return sum(WEIGHTS[n] * values[n] for n in names) / sum(WEIGHTS[n] for n in names)

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        parts = _QUALITY_PARTS + _SEMANTIC_PARTS
        total = (_QUALITY_PARTS * quality + _SEMANTIC_PARTS * semantic) / parts
    return Row(name, *(None if value is None else 100 * value for value in (total, quality, semantic)))


def as_text(raw: Mapping[str, float], *, name: str, is_long: bool) -> str:
    """Our row below the paper's, and our dimensions.

    Args:
      raw: scores by dimension.
      name: of the model.
      is_long: whether the videos were scored by VBench-Long.
    """
    rows = [*(LONG if is_long else SHORT), row(name, raw)]
    width = max(len(one.name) for one in rows)
    head = f"{'VBench-Long' if is_long else 'VBench':<{width}}  {'total':>7}{'quality':>9}{'semantic':>10}"
    lines = [head]
    for one in rows:
        values = f"{_percent(one.total):>7}{_percent(one.quality):>9}{_percent(one.semantic):>10}"
        lines.append(f"{one.name:<{width}}  {values}")
    lines += ["", f"{'dimension':<24}{'raw':>8}{'normalised':>12}"]
    values_of = normalised(raw)
    for dimension in DIMENSIONS:
        if dimension in raw:
            lines.append(f"{dimension:<24}{raw[dimension]:>8.4f}{100 * values_of[dimension]:>11.2f}%")
    missing = [dimension for dimension in DIMENSIONS if dimension not in raw]
    if missing:
        lines += ["", f"missing, so there is no total: {', '.join(missing)}"]
    return "\n".join(lines)


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"
