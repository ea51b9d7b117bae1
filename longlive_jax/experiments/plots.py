"""A study's figures, PNG and SVG, with Matplotlib (the extra "experiments").

Colours and dashes tell conditions apart together, so a figure can be read without colours. Bands and bars
are the 95% intervals of the table.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longlive_jax import storage
from longlive_jax.errors import UserError
from longlive_jax.experiments.study import TIME, Plot, Study, value_text
from longlive_jax.experiments.table import Result, Row

SUFFIXES = (".png", ".svg")

FOLDER = "plots"

# Okabe and Ito's palette: distinct under every common kind of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DASHES = ("-", "--", ":", "-.")
_SIZE = (6.4, 4.0)  # inches
_LEGEND_COLUMNS = 3
_BESIDE = 0.08  # between lines at one place of an axis without numbers


def check_installed(study: Study) -> None:
    """Refuses a study with figures where Matplotlib is missing, before anything is computed."""
    if study.plots:
        _pyplot()


def draw(result: Result, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws every figure of a study.

    Args:
      result: the table.
      folder: where the files go, in a folder of their own.

    Returns:
      The files, PNG before SVG for each figure.
    """
    if not result.study.plots:
        return []
    pyplot = _pyplot()
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for plot in result.study.plots:
        figure = _figure(pyplot, plot, result)
        for suffix in SUFFIXES:
            path = target / f"{plot.name}{suffix}"
            with storage.new_file(path) as temporary:
                # The same numbers give the same file: no date, no random ids.
                metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
                figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
            files.append(path)
        pyplot.close(figure)
    return files


def curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """One small figure per series of (step, value), as SVG texts."""
    if not series:
        return []
    pyplot, texts = _pyplot(), []
    for name, points in series.items():
        figure, axes = pyplot.subplots(figsize=(4.2, 2.4), layout="constrained")
        axes.plot(*zip(*points, strict=True), color=_COLOURS[0], linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.25)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        texts.append(text.getvalue())
        pyplot.close(figure)
    return texts


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            'plots need Matplotlib; install it with `pip install "longlive-jax[experiments]"`'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "longlive-jax", "svg.fonttype": "none", "font.size": 9})
    return pyplot


def _figure(pyplot: Any, plot: Plot, result: Result) -> Any:
    figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
    lines = _lines(plot, result)
    places = _places(plot, [row for rows in lines.values() for row in rows], result)
    is_numeric = plot.x == TIME or _is_numeric(result, plot.x)
    for i, (name, rows) in enumerate(lines.items()):
        beside = 0.0 if is_numeric else _BESIDE * (i - (len(lines) - 1) / 2)
        x = np.array([places[_value(plot, row)] + beside for row in rows])
        mean, low, high = (
            np.array([np.nan if getattr(row, end) is None else getattr(row, end) for row in rows])
            for end in ("mean", "low", "high")
        )
        colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
        style = {"color": colour, "linestyle": dash, "label": name or ("others" if len(lines) > 1 else None)}
        if plot.x == TIME:
            axes.plot(x, mean, **style)
            axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        else:
            if not is_numeric:
                style["linestyle"] = "none"
            errors = np.nan_to_num(np.stack([mean - low, high - mean]))
            axes.errorbar(x, mean, yerr=errors, marker="o", markersize=4, capsize=3, **style)
    if plot.x == TIME:
        axes.xaxis.get_major_locator().set_params(integer=True)
    elif not is_numeric:
        axes.set_xticks(list(places.values()), [value_text(value) for value in places])
    axes.set_xlabel("along the video" if plot.x == TIME else plot.x)
    axes.set_ylabel(plot.label or plot.measure)
    axes.grid(alpha=0.25)
    if len(lines) > 1 or any(lines):
        # Above the axes: inside, it hides error bars.
        columns = min(len(lines), _LEGEND_COLUMNS)
        figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _lines(plot: Plot, result: Result) -> dict[str, list[Row]]:
    """Rows by line; the name of a line is its values of `by`."""
    lines: dict[str, list[Row]] = {}
    for row in result.rows:
        if row.measure != plot.measure:
            continue
        shown = plot.by or ([name for name in row.axes if name != plot.x] if plot.x == TIME else ())
        name = ", ".join(f"{axis} {value_text(row.axes[axis])}" for axis in shown if axis in row.axes)
        lines.setdefault(name, []).append(row)
    if not lines:
        raise UserError(f"plots: {plot.name} shows {plot.measure!r}, which the study's metrics do not give")
    if plot.x != TIME:
        # A condition without the axis (one of another grid) has no place on it.
        lines = {name: [row for row in rows if plot.x in row.axes] for name, rows in lines.items()}
        lines = {name: rows for name, rows in lines.items() if rows}
    return lines


def _places(plot: Plot, rows: Sequence[Row], result: Result) -> Mapping[Any, float]:
    """Where the values of x stand: numbers where they are, others one beside the other."""
    values = list(dict.fromkeys(_value(plot, row) for row in rows))
    if plot.x == TIME or _is_numeric(result, plot.x):
        return {value: float(value or 0) for value in values}
    return {value: float(i) for i, value in enumerate(values)}


def _value(plot: Plot, row: Row) -> Any:
    return row.window if plot.x == TIME else row.axes[plot.x]


def _is_numeric(result: Result, axis: str) -> bool:
    values = [row.axes[axis] for row in result.rows if axis in row.axes]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
