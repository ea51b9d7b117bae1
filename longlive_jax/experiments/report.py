"""A study's Markdown report, and its place in the README of the study's folder."""

import dataclasses
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from longlive_jax import config_module, storage
from longlive_jax.errors import require
from longlive_jax.experiments import plots, table
from longlive_jax.experiments.cells import VIDEOS
from longlive_jax.experiments.progress import duration
from longlive_jax.experiments.study import Study, describe
from longlive_jax.experiments.table import Difference, Result, Row
from longlive_jax.provenance import versions

REPORT_FILE = "report.md"
STUDY_FILE = "study.json"

BEGIN = "<!-- results: written by `longlive ablate --publish` -->"
END = "<!-- end of results -->"


def write(result: Result, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes table, figures, report and `study.json` of a complete study; returns the files to look at."""
    table.write(result, folder)
    figures = plots.draw(result, folder)
    text = f"# {result.study.name}\n\n{result.study.question}\n\n{body(result)}"
    with storage.new_file(folder / REPORT_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    storage.write_json(folder / STUDY_FILE, summary(result))
    return [folder / REPORT_FILE, folder / table.CSV_FILE, *figures]


def summary(result: Result) -> dict[str, Any]:
    """What the HTML report and other tools read."""
    return {
        "format": "longlive-jax study",
        "study": describe(result.study),
        "conditions": {
            condition.label: {
                "axes": dict(condition.values),
                "config": result.configs[condition.label],
                "videos": [
                    f"{VIDEOS}/{name}"
                    for name in (_video(condition, i) for i in range(result.study.kept_videos))
                ],
            }
            for condition in result.study.conditions()
        },
        "baseline": result.study.baseline_label,
        "prompts": [list(prompts) for prompts in result.prompts],
        "table": [dataclasses.asdict(row) for row in result.rows if row.measure in result.study.columns],
        "differences": [dataclasses.asdict(one) for one in result.differences],
        "plots": [f"{plots.FOLDER}/{plot.name}.svg" for plot in result.study.plots],
        "machine": machine(),
        "seconds": round(result.seconds, 1),
    }


def _video(condition: Any, index: int) -> str:
    from longlive_jax.experiments.cells import video_file

    return video_file(pathlib.Path(), condition, index).name


def machine() -> dict[str, Any]:
    """Devices, cores and versions; nothing that identifies a host."""
    return {
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **versions(),
    }


def body(result: Result) -> str:
    """The report below its title: table, differences, figures, and how it was made."""
    study = result.study
    clips = study.clips * len(study.seeds)
    parts = [
        results_table(result),
        f"Means over {clips} clips ({study.clips} for each of the seeds {', '.join(map(str, study.seeds))}), "
        f"with 95% intervals. {_task(study)}",
        differences_table(result),
        "\n\n".join(f"![{p.label or p.measure}]({plots.FOLDER}/{p.name}.png)" for p in study.plots),
        f"In the paper: {study.paper}" if study.paper else "",
        _made_by(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def results_table(result: Result) -> str:
    """A row per condition, a column per measure of `columns`; windows as their means in order."""
    study = result.study
    labels = [condition.label for condition in study.conditions()]
    lines = [["", *study.columns]]
    for label in labels:
        lines.append([label, *(_entry(result.find(label, name)) for name in study.columns)])
    return markdown(lines)


def _entry(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    if rows[0].window is not None:
        return " ".join("-" if row.mean is None else _short(row.mean) for row in rows)
    row = rows[0]
    if row.mean is None:
        return "-"
    if row.low is None or row.high is None:
        return _short(row.mean)
    return f"{_short(row.mean)} ({_short(row.low)} to {_short(row.high)})"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def differences_table(result: Result) -> str:
    """What differs from the baseline, and how many differences were looked at."""
    known = [one for one in result.differences if one.difference is not None]
    if not known:
        return ""
    found = [one for one in known if one.differs]
    head = f"Against `{result.study.baseline_label}`, clip by clip (same prompts, same noise): "
    chance = "about one in twenty excludes 0 by chance"
    head += f"{len(found)} of {len(known)} differences exclude 0 at 95% ({chance})."
    if not found:
        return head
    lines = [["", "measure", "difference", "clips"]]
    lines += [[one.condition, one.measure, _interval(one), str(one.clips)] for one in found]
    return f"{head}\n\n{markdown(lines)}"


def _interval(one: Difference) -> str:
    assert one.difference is not None
    return f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def _task(study: Study) -> str:
    task = study.task
    kinds = {
        "Scenes": "Scenes of the toy world in combinations that training never showed",
        "Switch": "Scenes of the toy world with one prompt switch halfway",
        "Segments": "Stories of the toy world",
        "PromptFile": "Prompts of a file",
    }
    return f"{kinds[type(task).__name__]}, {task.frames} latent frames."


def _made_by(result: Result) -> str:
    facts = machine()
    cores = "1 core" if facts["cores"] == 1 else f"{facts['cores']} cores"
    packages = ", ".join(f"{name} {facts[name]}" for name in ("jax", "flax"))
    took = f"{duration(result.seconds)}, all cells one after the other"
    return f"Made on {', '.join(facts['devices'])} ({cores}) in {took}; {packages}."


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head, all columns but the first are right-aligned."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]

    def row(line: Sequence[str]) -> str:
        first, *others = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(cells[0]), row(rule), *(row(line) for line in cells[1:])])


# --- publishing -------------------------------------------------------------------------------------


def publish(result: Result, made: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Puts a study's results in its folder: the table, the figures and the README's part for results.

    Args:
      result: the results.
      made: where `write` has put the files.
      folder: the study's own, with a README.md that has a place for them.

    Returns:
      The README.

    Raises:
      UserError: the README has no such place.
    """
    readme = folder / "README.md"
    check_place(readme)
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    shutil.copyfile(made / table.CSV_FILE, folder / table.CSV_FILE)
    if result.study.plots:
        (folder / plots.FOLDER).mkdir(exist_ok=True)
        for file in sorted((made / plots.FOLDER).iterdir()):
            storage.copy_file(file, folder / plots.FOLDER / file.name)
    with storage.new_file(readme) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{body(result)}\n{END}{after}", encoding="utf-8")
    return readme


def check_place(readme: pathlib.Path) -> None:
    """Refuses a README without the two comments that results are written between."""
    require(readme.is_file(), f"--publish: {readme} does not exist; results are written into it")
    text = readme.read_text(encoding="utf-8")
    require(
        text.count(BEGIN) == 1 and text.find(END) > text.find(BEGIN),
        f"--publish: {readme} has no place for results; add the lines {BEGIN} and {END}",
    )


def settings_table(configs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The settings in which configs differ: a head line, then name and values per setting."""
    flat = {label: config_module.flatten(config) for label, config in configs.items()}
    names = list(dict.fromkeys(name for values in flat.values() for name in values))
    lines = [["setting", *flat]]
    for name in names:
        values = [one.get(name) for one in flat.values()]
        if any(value != values[0] for value in values):
            lines.append([name, *(json.dumps(value) for value in values)])
    return lines
