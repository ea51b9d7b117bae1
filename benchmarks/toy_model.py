"""What the toy model shows, read from its pixels: adherence, long videos, prompt switches, ablations.

    python -m benchmarks.toy_model toy
    python -m benchmarks.toy_model toy --compare init=runs/toy/init/export

Videos of attribute combinations that training never showed are generated through the public pipeline and
measured by `longlive_jax.toy.evaluation`, which says what every number is. Means come with 95% intervals
over clips. Ablations and other checkpoints see the same prompts and the same noise, so their differences
are taken pair by pair.

Every cell (one condition with one seed) is stored under --cells when it is done; an interrupted run goes on
from there.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import common
from longlive_jax import storage, toy
from longlive_jax.checkpoint import Checkpoint, open_checkpoint
from longlive_jax.config import PipelineConfig, SwitchPolicy, even_steps
from longlive_jax.config_dict import override, to_dict
from longlive_jax.errors import UserError, require
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import PromptSwitch, Story
from longlive_jax.provenance import fingerprints
from longlive_jax.toy import evaluation
from longlive_jax.training.world import world_of

CELL_VERSION = 3
"""To be raised when what a cell holds changes: stored cells of another version are measured again."""

MODEL = "model"
"""What the first checkpoint is called beside those of --compare."""

KINDS = ("clip", "switch", "long")

OPENING = 16
"""Denoising steps of the first block in the cell that has more of them there."""

# Sections of the first checkpoint's config that all are measured with.
_SHARED = ("window", "sampler", "switch")
_SEED_STRIDE = 100_000  # noise seeds of the clips of one seed
_LINE_EVERY = 15.0  # seconds between lines of progress

_PLAIN_MEASURES = (
    *("all", "shape", "colour", "motion", "background", "first.shape", "last.all", "fall.all"),
    *("present", "vanished", "iou"),
    *("identity.size", "identity.shade", "identity.gradient", "identity.lane"),
    *("drift.sprite", "drift.background", "flicker"),
)
_SWITCH_MEASURES = (
    *("held", "stays", "obeyed", "new in block 1", "new in block 2", "new in block 3", "jump", "jump.place"),
    *("jump.size", "jump.shade", "jump.gradient"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One condition.

    Attributes:
      name: what it is called in the result.
      checkpoint: `MODEL` or the name of a --compare.
      frames: latent frames per clip.
      overrides: settings that differ from the first checkpoint's.
      policy: what happens to the cache at the prompt switch; None does not switch.
    """

    name: str
    checkpoint: str
    frames: int
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    policy: SwitchPolicy | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.name.split(",")[0]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured: clips per cell and seed, seeds, clips side by side, latent frames.

    `long_clips` is how many clips the long cells have; None for as many as the others.
    """

    clips: int
    seeds: tuple[int, ...]
    batch: int
    frames: int
    long_frames: int
    switch_frames: int
    long_clips: int | None = None

    def __post_init__(self) -> None:
        for name in ("clips", "batch", "frames", "long_frames", "switch_frames", "long_clips"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name.replace('_', '-')}={value} must be positive")
        for name, clips in (("clips", self.clips), ("long-clips", self.long_clips or 0)):
            require(clips <= _SEED_STRIDE, f"--{name}={clips} must be at most {_SEED_STRIDE}")
        require(len(set(self.seeds)) == len(self.seeds), f"--seeds={self.seeds} must differ")
        require(all(0 <= s < 40_000 for s in self.seeds), f"--seeds={self.seeds} must be in [0, 40000)")

    def clips_of(self, cell: Cell) -> int:
        """Clips of a cell, per seed."""
        return self.long_clips if cell.kind == "long" and self.long_clips else self.clips


# --- the plan ---------------------------------------------------------------------------------------


def plan(config: PipelineConfig, settings: Settings, others: Sequence[str]) -> list[Cell]:
    """Every cell, the model's own first."""
    rope = "absolute" if config.window.rope == "relative" else "relative"
    long, switch = settings.long_frames, settings.switch_frames
    opened = {"sampler.opening_steps": even_steps(OPENING)}
    cells = [
        Cell("clip", MODEL, settings.frames),
        Cell("switch, recache", MODEL, switch, policy="recache"),
        Cell("long", MODEL, long),
        Cell("switch, keep", MODEL, switch, policy="keep"),
        Cell("switch, clear", MODEL, switch, policy="clear"),
        Cell(f"clip, opening steps {OPENING}", MODEL, settings.frames, opened),
        Cell(f"long, {rope} rope", MODEL, long, {"window.rope": rope}),
    ]
    if config.window.sink_frames > 0:
        cells.append(Cell("long, sink 0", MODEL, long, {"window.sink_frames": 0}))
    for name in others:
        cells += [
            Cell(f"clip, {name}", name, settings.frames),
            Cell(f"switch, recache, {name}", name, switch, policy="recache"),
            Cell(f"long, {name}", name, long),
        ]
    return cells


def pairs(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Which cells are compared: every other one with the model's own of its kind, and keep with clear."""
    own: dict[str, str] = {}
    for cell in cells:  # the model's own of a kind comes first
        own.setdefault(cell.kind, cell.name)
    found = [(own[cell.kind], cell.name) for cell in cells if cell.name != own[cell.kind]]
    keeps_and_clears = ("switch, keep", "switch, clear")
    return [*found, keeps_and_clears] if "switch" in own else found


# --- one cell ---------------------------------------------------------------------------------------


def measure(
    cell: Cell, pipe: Pipeline, settings: Settings, seed: int, progress: "Progress"
) -> evaluation.Table:
    """Generates and measures one cell with one seed."""
    config = pipe.config
    world, indices = world_of(config), np.arange(settings.clips_of(cell))
    scenes = toy.sample_scenes(world, seed=seed, indices=indices, split="held_out")
    captions = toy.describe_scenes(scenes)
    stories, new, at = [Story(caption) for caption in captions], scenes.codes, 0
    if cell.policy is not None:
        block = config.window.block_frames
        at = cell.frames // block // 2 * block
        changes = [evaluation.CHANGES[i % len(evaluation.CHANGES)] for i in indices]
        new, templates = evaluation.sample_switches(scenes.codes, changes=changes, seed=seed, indices=indices)
        after = toy.grammar.describe_codes(new, templates)
        stories = [
            Story(old, (PromptSwitch(at, text, policy=cell.policy),))
            for old, text in zip(captions, after, strict=True)
        ]
    readings = evaluation.join_readings(
        [
            evaluation.read_pixels(world, videos)
            for videos in _videos(pipe, stories, cell, settings, seed, progress)
        ]
    )
    shared: dict[str, Any] = {"vae": config.vae, "frames": cell.frames}
    if cell.policy is None:
        return evaluation.measure_clips(
            world,
            readings,
            scenes.codes,
            **shared,
            window_frames=min(12, cell.frames),
            end_frames=min(21, cell.frames),
        )
    return evaluation.measure_switches(
        world,
        readings,
        old=scenes.codes,
        new=new,
        **shared,
        switch_frame=at,
        block_frames=config.window.block_frames,
    )


def _videos(
    pipe: Pipeline,
    stories: Sequence[Story],
    cell: Cell,
    settings: Settings,
    seed: int,
    progress: "Progress",
) -> Iterator[np.ndarray]:
    """Videos uint8 [b, V, Y, X, 3], a batch at a time."""
    for first in range(0, len(stories), settings.batch):
        group = stories[first : first + settings.batch]
        seeds = [_SEED_STRIDE * seed + first + i for i in range(len(group))]
        chunks = []
        for chunk in pipe.stream(list(group), frames=cell.frames, seed=seeds):
            chunks.append(chunk.video)
            progress.advance(chunk.latents.shape[0] * chunk.latents.shape[1])
        yield np.concatenate(chunks, axis=1)


def load(opened: Checkpoint, cell: Cell, shared: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a cell: its checkpoint with the first one's way to generate, and its overrides."""
    return Pipeline.load(opened.path, overrides={**shared, **cell.overrides})


def shared_settings(config: PipelineConfig) -> dict[str, Any]:
    """How the first checkpoint generates, as overrides for the others."""
    found = {
        f"{section}.{name}": value
        for section in _SHARED
        for name, value in to_dict(getattr(config, section)).items()
    }
    return found | {"dtype": config.dtype}


class Progress:
    """Lines on standard error: what is under way, and the time left.

    Args:
      work: latent frames of all clips that are still to be made.
      is_quiet: show nothing.
    """

    def __init__(self, work: int, *, is_quiet: bool) -> None:
        self._work, self._done, self._is_quiet = work, 0, is_quiet
        self._started = self._last = time.monotonic()
        self._name = ""

    def start(self, name: str) -> None:
        self._name = name
        self._show()

    def advance(self, frames: int) -> None:
        self._done += frames
        if time.monotonic() - self._last > _LINE_EVERY:
            self._show()

    def _show(self) -> None:
        self._last = now = time.monotonic()
        if self._is_quiet:
            return
        left = "time left: not known yet"
        if self._done:
            minutes, seconds = divmod(
                round((now - self._started) * (self._work - self._done) / self._done), 60
            )
            left = f"{minutes}:{seconds:02d} left"
        share = self._done / max(self._work, 1)
        print(f"{share:4.0%}  {left}  {self._name}", file=sys.stderr, flush=True)


# --- stored cells -----------------------------------------------------------------------------------


def cell_key(
    cell: Cell, opened: Checkpoint, settings: Settings, seed: int, shared: Mapping[str, Any]
) -> dict:
    """Everything a cell's numbers depend on."""
    config = override(opened.config, {**shared, **cell.overrides})
    return {
        "version": CELL_VERSION,
        "config": to_dict(config),
        "weights": fingerprints(opened),
        "frames": cell.frames,
        "policy": cell.policy,
        "clips": settings.clips_of(cell),
        "seed": seed,
    }


def cell_file(folder: pathlib.Path, name: str, key: Mapping[str, Any]) -> pathlib.Path:
    """Where a cell is stored; another key is another file."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder / f"{name.replace(', ', '-').replace(' ', '')}-seed{key['seed']}-{digest}.json"


def store_cell(file: pathlib.Path, key: Mapping[str, Any], table: evaluation.Table, seconds: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {name: _plain(array, digits=6) for name, array in table.items()}
    storage.write_json(file, {"key": dict(key), "seconds": round(seconds, 1), "table": values})


def read_cell(file: pathlib.Path) -> tuple[evaluation.Table, float]:
    stored = storage.read_json(file)
    table = {name: np.array(values, np.float64) for name, values in stored["table"].items()}
    return table, stored["seconds"]


def _plain(array: np.ndarray, *, digits: int) -> Any:
    """Nested lists, rounded, with None for what is not a number."""
    if np.ndim(array) > 0:
        return [_plain(row, digits=digits) for row in array]
    return None if np.isnan(array) else round(float(array), digits)


# --- the result -------------------------------------------------------------------------------------


def summarise(table: evaluation.Table) -> dict[str, Any]:
    """Mean, 95% interval and number of clips of every measure; lists where there are windows."""
    result = {}
    for name, values in table.items():
        found = evaluation.estimate(values)
        ends = {end: _plain(getattr(found, end), digits=4) for end in ("mean", "low", "high")}
        result[name] = {**ends, "clips": found.clips.tolist()}
    return result


def differences(tables: Mapping[str, evaluation.Table], chosen: Sequence[tuple[str, str]]) -> list[dict]:
    """The rows of the table that says which conditions differ."""
    rows = []
    for first, second in chosen:
        for measure_name in _SWITCH_MEASURES if first.startswith("switch") else _PLAIN_MEASURES:
            a, b = (_column(tables[name], measure_name) for name in (first, second))
            found = evaluation.compare(a, b)
            values = {k: _plain(np.float64(v), digits=4) for k, v in dataclasses.asdict(found).items()}
            names = {"first_cell": first, "second_cell": second, "measure": measure_name}
            rows.append({**names, **values, "clips": found.clips, "differs": found.differs})
    return rows


def _column(table: evaluation.Table, name: str) -> np.ndarray:
    """A measure per clip; "new in block N" is a column of the blocks after the switch."""
    if not name.startswith("new in block "):
        return table[name]
    return table["blocks.new"][:, int(name.rsplit(" ", 1)[1]) - 1]


def format_differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """The differences as text, one line each."""
    lines = [f"{'first':24}{'second':28}{'measure':20}{'first':>8}{'second':>8}  difference (95%)  differs"]
    for row in rows:
        if row["difference"] is None:
            continue
        interval = f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        verdict = "yes" if row["differs"] else "-"
        lines.append(
            f"{row['first_cell']:24}{row['second_cell']:28}{row['measure']:20}"
            f"{row['first']:8.3f}{row['second']:8.3f}  {interval:28}{verdict}"
        )
    return "\n".join(lines)


def format_estimates(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The measures without windows as text, one line each."""
    lines = []
    for cell, measures in cells.items():
        for name, found in measures.items():
            if not isinstance(found["mean"], list) and found["mean"] is not None:
                interval = f"{found['low']:.3f} to {found['high']:.3f}"
                lines.append(f"{cell:28}{name:24}{found['mean']:7.3f}  ({interval}, n = {found['clips']})")
    return "\n".join(lines)


def describe_checkpoint(opened: Checkpoint) -> dict[str, Any]:
    """What was measured: weights by content, stage and steps; no paths."""
    source = {name: opened.source[name] for name in ("stage", "steps", "seed") if name in opened.source}
    parts = {
        name: {"stored": info.dtype, "parameters": info.parameters} for name, info in opened.parts.items()
    }
    return {"source": source, "parts": parts, "weights": fingerprints(opened)}


# --- the command ------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what is not stored yet; returns the result."""
    settings = Settings(
        clips=arguments.clips,
        seeds=tuple(arguments.seeds),
        batch=arguments.batch,
        frames=arguments.frames,
        long_frames=arguments.long_frames,
        switch_frames=arguments.switch_frames,
        long_clips=arguments.long_clips,
    )
    names = [name for name, _ in arguments.compare]
    require(len({MODEL, *names}) == len(names) + 1, f"--compare: the names {names} must differ")
    opened = {
        name: open_checkpoint(path) for name, path in [(MODEL, arguments.checkpoint), *arguments.compare]
    }
    config = opened[MODEL].config
    shared = shared_settings(config)
    cells = [cell for cell in plan(config, settings, names) if cell.kind in arguments.only]
    keys = {
        (cell.name, seed): cell_key(cell, opened[cell.checkpoint], settings, seed, shared)
        for cell in cells
        for seed in settings.seeds
    }
    files = {at: cell_file(arguments.cells, at[0], key) for at, key in keys.items()}
    missing = {at for at, file in files.items() if not file.exists()}
    work = sum(
        cell.frames * settings.clips_of(cell)
        for cell in cells
        for s in settings.seeds
        if (cell.name, s) in missing
    )
    progress = Progress(work, is_quiet=arguments.quiet)
    tables, seconds = {}, {}
    for cell in cells:
        pipe = None
        for seed in settings.seeds:
            at = (cell.name, seed)
            if at in missing:
                progress.start(f"{cell.name}, seed {seed}")
                started = time.monotonic()
                pipe = pipe or load(opened[cell.checkpoint], cell, shared)
                table = measure(cell, pipe, settings, seed, progress)
                store_cell(files[at], keys[at], table, time.monotonic() - started)
        stored = [read_cell(files[cell.name, seed]) for seed in settings.seeds]
        tables[cell.name] = {
            name: np.concatenate([table[name] for table, _ in stored]) for name in stored[0][0]
        }
        seconds[cell.name] = round(sum(s for _, s in stored), 1)
    rows = differences(tables, pairs(cells))
    return {
        "what": __doc__.splitlines()[0],
        "checkpoints": {name: describe_checkpoint(found) for name, found in opened.items()},
        "settings": dataclasses.asdict(settings),
        "generation": {section: to_dict(getattr(config, section)) for section in (*_SHARED, "video")},
        "dtype": config.dtype,
        "cells": {name: summarise(table) for name, table in tables.items()},
        "differences": rows,
        "about_differences": f"{len(rows)} intervals at 95%: about one in twenty excludes 0 by chance",
        "seconds": seconds,
    }


def parser_of(
    description: str | None, *, name: str, clips: int, seeds: Sequence[int], frames: int
) -> argparse.ArgumentParser:
    """The options of every script that measures videos of the toy world.

    Args:
      description: of the script.
      name: of its result.
      clips: default number of clips per cell and seed.
      seeds: default seeds.
      frames: default length in latent frames.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=clips, help="clips per cell and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="of scenes and noise")
    parser.add_argument("--batch", type=int, default=16, help="clips side by side")
    parser.add_argument("--frames", type=int, default=frames, help="latent frames of the clips")
    parser.add_argument("--json", type=pathlib.Path, default=common.RESULTS / f"{name}.json", help="result")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def add_long(parser: argparse.ArgumentParser, *, name: str) -> None:
    """Adds what the scripts share that measure long clips too, and store every cell."""
    parser.add_argument("--long-frames", type=int, default=240, help="latent frames of the long clips")
    cells = pathlib.Path("outputs") / name
    parser.add_argument("--cells", type=pathlib.Path, default=cells, help="where finished cells are kept")


def named(text: str) -> tuple[str, str]:
    """NAME=CHECKPOINT of a command line."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=CHECKPOINT")
    return name, path


def finish(
    arguments: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]
) -> dict[str, Any] | None:
    """Runs and stores the result with the machine's description; None after an error in one line."""
    try:
        result = run(arguments)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(arguments.json, {"machine": common.machine(), **result})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    return result


def main(words: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, name="toy_model", clips=64, seeds=(111, 112, 113), frames=60)
    add_long(parser, name="toy_model")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or toy")
    parser.add_argument(
        "--compare", type=named, action="append", default=[], metavar="NAME=CHECKPOINT", help="repeatable"
    )
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="kinds of cells")
    parser.add_argument("--long-clips", type=int, default=16, help="clips per long cell and seed")
    parser.add_argument("--switch-frames", type=int, default=48, help="latent frames around a switch")
    arguments = parser.parse_args(words)
    result = finish(arguments, run)
    if result is None:
        return 2
    print(format_estimates(result["cells"]))
    print(f"\n{format_differences(result['differences'])}")
    print(f"({result['about_differences']})\n\n{arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
