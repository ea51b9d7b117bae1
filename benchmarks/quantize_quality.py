"""What 8 bits cost in the toy world: adherence and drift by recipe, with and without a quantised cache.

    python -m benchmarks.quantize_quality toy
    python -m benchmarks.quantize_quality runs/toy/long/export --clips 64

Every variant of one checkpoint makes the same clips (prompts that training never showed, the same noise), 60
latent frames and 240; they are measured by `longlive_jax.toy.evaluation` as in `benchmarks/toy_model.py`.
Differences from the model in full precision are taken pair by pair, with 95% intervals. Adherence is in
points of 100. The checkpoint is quantised as it is loaded; nothing is written but the results.

Every cell (one variant, length and seed) is stored under --cells when it is done; an interrupted run goes on
from there.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from benchmarks import toy_model
from benchmarks.toy_model import Cell, Progress, Settings
from longlive_jax.checkpoint import open_checkpoint
from longlive_jax.config import DType
from longlive_jax.errors import require
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.toy import evaluation

RECIPES = ("none", "int8", "int8-weight-only", "fp8")
CACHES = ("same", "int8", "fp8")
KINDS = ("clip", "long")
PLAIN = "none, same cache"

ADHERENCE = "all"
MEASURES = (ADHERENCE, "fall.all", "present", "drift.sprite", "drift.background", "flicker", "identity.shade")
ALLOWED_LOSS = 1.0
"""Points of adherence that int8 may cost."""


def plan(settings: Settings, *, recipes: Sequence[str], caches: Sequence[str]) -> list[Cell]:
    """Every cell, full precision first."""
    lengths = {"clip": settings.frames, "long": settings.long_frames}
    return [
        Cell(
            f"{kind}, {recipe}, {cache} cache",
            toy_model.MODEL,
            frames,
            {"quantization": recipe, "cache_dtype": cache},
        )
        for (recipe, cache), (kind, frames) in itertools.product(
            itertools.product(recipes, caches), lengths.items()
        )
    ]


def differences(tables: Mapping[str, evaluation.Table]) -> list[dict[str, Any]]:
    """Variant minus full precision, for every kind and measure; shares in points of 100."""
    rows = []
    for name, table in tables.items():
        kind, variant = name.split(", ", 1)
        if variant == PLAIN:
            continue
        for measure in MEASURES:
            found = evaluation.compare(table[measure], tables[f"{kind}, {PLAIN}"][measure])
            values = {
                key: round(100 * value, 3) if np.isfinite(value) else None
                for key, value in dataclasses.asdict(found).items()
                if key != "clips"
            }
            rows.append(
                {
                    "kind": kind,
                    "variant": variant,
                    "measure": measure,
                    "clips": found.clips,
                    **values,
                    "differs": found.differs,
                }
            )
    return rows


def table_of(rows: Sequence[Mapping[str, Any]], cells: Mapping[str, Any]) -> str:
    """The Markdown table of the documentation: adherence of both lengths, and drift of the long one."""
    shown = (
        ("clip", ADHERENCE, "adherence"),
        ("long", ADHERENCE, "adherence, long"),
        ("long", "drift.sprite", "drift of the sprite"),
        ("long", "drift.background", "drift of the background"),
    )
    lines = ["| recipe, cache | " + " | ".join(f"{name} x 100" for _, _, name in shown) + " |"]
    lines.append("|---|" + "---:|" * len(shown))
    by_name = {(row["kind"], row["variant"], row["measure"]): row for row in rows}
    for variant in dict.fromkeys(name.split(", ", 1)[1] for name in cells):
        columns = []
        for kind, measure, _ in shown:
            found = cells[f"{kind}, {variant}"][measure]
            if found["mean"] is None:
                columns.append("-")
                continue
            text = f"{100 * found['mean']:.1f}"
            row = by_name.get((kind, variant, measure))
            if row is not None:
                text += f" ({row['difference']:+.1f}, {row['low']:+.1f} to {row['high']:+.1f})"
            columns.append(text)
        lines.append(f"| {variant} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether int8 costs at most `ALLOWED_LOSS` points, by length; the interval says how surely."""
    found = {}
    for row in rows:
        if row["variant"] == "int8, same cache" and row["measure"] == ADHERENCE:
            loss = -row["difference"]
            found[row["kind"]] = {"loss": loss, "at_most": -row["low"], "passes": loss <= ALLOWED_LOSS}
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what is not stored yet; returns the result."""
    settings = Settings(
        clips=arguments.clips,
        seeds=tuple(arguments.seeds),
        batch=arguments.batch,
        frames=arguments.frames,
        long_frames=arguments.long_frames,
        switch_frames=arguments.frames,
    )
    opened = open_checkpoint(arguments.checkpoint)
    require(
        opened.config.quantization == "none",
        f"checkpoint={arguments.checkpoint} is quantised; name the one in full precision",
    )
    require(
        "none" in arguments.recipes and "same" in arguments.caches,
        "--recipes must name none and --caches must name same: all others are compared with these",
    )
    shared = {**toy_model.shared_settings(opened.config), "dtype": arguments.dtype}
    cells = plan(settings, recipes=arguments.recipes, caches=arguments.caches)
    cells = [cell for cell in cells if cell.kind in arguments.only]
    keys = {
        (cell.name, seed): toy_model.cell_key(cell, opened, settings, seed, shared)
        for cell in cells
        for seed in settings.seeds
    }
    files = {at: toy_model.cell_file(arguments.cells, at[0], key) for at, key in keys.items()}
    missing = {at for at, file in files.items() if not file.exists()}
    frames = {cell.name: cell.frames for cell in cells}
    progress = Progress(sum(frames[name] * settings.clips for name, _ in missing), is_quiet=arguments.quiet)
    tables, seconds = {}, {}
    for cell in cells:
        pipe: Pipeline | None = None
        for seed in settings.seeds:
            at = (cell.name, seed)
            if at in missing:
                progress.start(f"{cell.name}, seed {seed}")
                started = time.monotonic()
                pipe = pipe or toy_model.load(opened, cell, shared)
                table = toy_model.measure(cell, pipe, settings, seed, progress)
                toy_model.store_cell(files[at], keys[at], table, time.monotonic() - started)
        stored = [toy_model.read_cell(files[cell.name, seed]) for seed in settings.seeds]
        tables[cell.name] = {
            name: np.concatenate([table[name] for table, _ in stored]) for name in stored[0][0]
        }
        seconds[cell.name] = round(sum(s for _, s in stored), 1)
    rows = differences(tables)
    estimates = {name: toy_model.summarise(table) for name, table in tables.items()}
    return {
        "what": __doc__.splitlines()[0],
        "checkpoint": toy_model.describe_checkpoint(opened),
        "settings": dataclasses.asdict(settings),
        "dtype": arguments.dtype,
        "int8_loses_points": verdict(rows),
        "cells": estimates,
        "differences": rows,
        "seconds": seconds,
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = toy_model.parser_of(__doc__, name="quantize_quality", clips=32, seeds=(101, 102, 103), frames=60)
    toy_model.add_long(parser, name="quantize_quality")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", default="toy", help="what is quantised"
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=(*RECIPES, "fp8-weight-only"), default=RECIPES, help="of the weights"
    )
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES[:2], help="kinds of cache")
    parser.add_argument("--dtype", choices=get_args(DType), default="bfloat16", help="of the full precision")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="lengths")
    arguments = parser.parse_args(words)
    result = toy_model.finish(arguments, run)
    if result is None:
        return 2
    if set(arguments.only) == set(KINDS):
        print(table_of(result["differences"], result["cells"]))
    print(f"int8 against full precision: {result['int8_loses_points']}\n\n{arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
