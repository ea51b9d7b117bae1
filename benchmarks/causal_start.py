"""Which start suits the distillation: students made causal in two ways, sampled in its few steps.

    python -m benchmarks.causal_start \\
        teacher_forcing=runs/toy/causal_init/export ode=runs/toy/causal_ode/export

Every export of stage `causal_init` generates the same held-out scenes from the same noise, block by block
through the public pipeline, in its sampler's few steps. Adherence is read from the pixels as in
`benchmarks.toy_model`, with 95% intervals over clips; differences from the first export are taken pair by
pair. Training seconds are those of the report.json beside an export (of the last start of the run only).
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import toy_model
from benchmarks.toy_model import MODEL, Cell, Progress, Settings
from longlive_jax import storage
from longlive_jax.checkpoint import Checkpoint, open_checkpoint
from longlive_jax.config_dict import to_dict
from longlive_jax.errors import require
from longlive_jax.toy import evaluation
from longlive_jax.training.metrics import REPORT_FILE

MEASURES = ("shape", "colour", "motion", "background", "all", "iou")


def training_cost(export: pathlib.Path) -> dict[str, Any]:
    """Steps and seconds of the run that made an export; empty where its report is missing."""
    file = export.parent / REPORT_FILE
    if not file.is_file():
        return {}
    report = storage.read_json(file)
    return {name: report[name] for name in ("steps", "resumed_at", "seconds", "seconds_per_step")}


def measure(
    opened: Checkpoint, shared: Mapping[str, Any], settings: Settings, progress: Progress
) -> evaluation.Table:
    """`MEASURES` by clip, over all seeds."""
    cell = Cell("clip", MODEL, settings.frames)
    pipe = toy_model.load(opened, cell, shared)
    tables = [toy_model.measure(cell, pipe, settings, seed, progress) for seed in settings.seeds]
    return {name: np.concatenate([table[name] for table in tables]) for name in MEASURES}


def compare(first: evaluation.Table, second: evaluation.Table) -> dict[str, Any]:
    """Paired differences, first minus second."""
    found = {name: evaluation.compare(first[name], second[name]) for name in MEASURES}
    return {name: dataclasses.asdict(d) | {"differs": d.differs} for name, d in found.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every export; returns the result."""
    paths: dict[str, str] = dict(arguments.exports)
    require(
        len(paths) == len(arguments.exports) >= 2,
        f"exports={[name for name, _ in arguments.exports]} must be two or more, of different names",
    )
    # One kind of cell is made: the lengths of the others only have to be allowed.
    settings = Settings(
        clips=arguments.clips,
        seeds=tuple(arguments.seeds),
        batch=arguments.batch,
        frames=arguments.frames,
        long_frames=arguments.frames,
        switch_frames=arguments.frames,
    )
    opened = {name: open_checkpoint(path) for name, path in paths.items()}
    first, *others = opened
    shared = toy_model.shared_settings(opened[first].config)
    work = len(paths) * len(settings.seeds) * settings.clips * settings.frames
    progress, tables = Progress(work, is_quiet=arguments.quiet), {}
    for name, checkpoint in opened.items():
        progress.start(name)
        tables[name] = measure(checkpoint, shared, settings, progress)
    return {
        "what": "adherence of causal students before their distillation, in its denoising steps",
        "settings": {key: getattr(settings, key) for key in ("clips", "seeds", "batch", "frames")},
        "generation": {key: to_dict(getattr(opened[first].config, key)) for key in ("window", "sampler")},
        "exports": {
            name: {
                **toy_model.describe_checkpoint(opened[name]),
                "training": training_cost(pathlib.Path(paths[name])),
                "scores": toy_model.summarise(tables[name]),
            }
            for name in opened
        },
        "differences": {f"{first} - {name}": compare(tables[first], tables[name]) for name in others},
    }


def format_result(result: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = []
    for name, export in result["exports"].items():
        seconds = export["training"].get("seconds")
        lines.append(f"{name}: trained in {'unknown time' if seconds is None else f'{seconds:.0f} s'}")
    lines.append(toy_model.format_estimates({n: export["scores"] for n, export in result["exports"].items()}))
    for pair, found in result["differences"].items():
        for name, d in found.items():
            verdict = "  differs" if d["differs"] else ""
            lines.append(
                f"{pair:28}{name:24}{d['difference']:+.3f}  ({d['low']:+.3f} to {d['high']:+.3f}){verdict}"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = toy_model.parser_of(__doc__, name="causal_start", clips=64, seeds=(101, 102), frames=21)
    parser.add_argument(
        "exports", type=toy_model.named, nargs="+", metavar="NAME=CHECKPOINT", help="two exports or more"
    )
    arguments = parser.parse_args(words)
    result = toy_model.finish(arguments, run)
    if result is None:
        return 2
    print(f"{format_result(result)}\n\n{arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
