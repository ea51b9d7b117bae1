"""Stores a trained toy model inside the package, where `Pipeline.load("toy")` finds it.

    python -m longlive_jax.toy.bundle weights --runs runs/toy runs/toy/reward/export
    python -m longlive_jax.toy.bundle card --results benchmarks/results/toy_model.json

Of several checkpoints the mean of the transformers is stored: late weights of a run scatter around something
better than each of them (arXiv 1803.05407). The weights are rounded to bfloat16, which halves them; they are
computed with in the precision the config says. What was trained is recorded with them, from the reports of
the runs. The model card is written from that record and from the measurements, and refuses those of other
weights.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from longlive_jax import checkpoint as checkpoint_lib
from longlive_jax import lora, storage
from longlive_jax.checkpoint import BUNDLED, Checkpoint, open_checkpoint
from longlive_jax.errors import UserError, require
from longlive_jax.storage import PathLike
from longlive_jax.toy import card
from longlive_jax.types import Params

NAME = "toy"

PARTS = ("transformer", "text_encoder", "vae")
"""What generation needs; nothing else is stored."""

LIMIT_BYTES = 12_000_000
"""Largest bundled model: it is part of every installation."""

CARD_FILE = "MODEL_CARD.md"

_KEPT = ("stage", "steps", "seed")  # of the source; the paths in it mean nothing elsewhere
_TRAINING = "training"  # in the bundled checkpoint's source: the runs that made it, see `card.training`


def bundle(
    source: PathLike,
    *more: PathLike,
    runs: PathLike | None = None,
    destination: PathLike | None = None,
) -> pathlib.Path:
    """Stores a checkpoint in bfloat16, with what generation needs and no more.

    Args:
      source: a checkpoint directory, for example the export of the last stage. A moving average stands in
        for a transformer that is not there, and a LoRA that is kept apart is merged in.
      *more: others of the same run: the transformer is the mean of all, everything else the last one's.
      runs: the folder with a folder per run, each with its report.json, of which a record is kept; the runs
        before them may be those that the record of a base names. Default: no record.
      destination: directory to write; default the package's. A checkpoint there is replaced, its card
        included: it told of other weights.

    Returns:
      The directory.

    Raises:
      UserError: a part or the tokenizer is missing, the checkpoints are of different models, the result
        would be larger than `LIMIT_BYTES`, or the runs do not explain the checkpoint.
    """
    every = [open_checkpoint(path) for path in (source, *more)]
    opened = every[-1]
    for other in every:
        require(
            other.config == opened.config,
            f"{other.path} has another config than {opened.path}; give exports of one run",
        )
    path = BUNDLED[NAME] if destination is None else pathlib.Path(destination)
    trees = {part: _load(opened, part) for part in PARTS if part != "transformer"}
    trees["transformer"] = jax.tree.map(_mean, *(_load(each, "transformer") for each in every))
    trees = {part: jax.tree.map(_rounded, trees[part]) for part in PARTS}
    size = sum(leaf.nbytes for tree in trees.values() for leaf in jax.tree.leaves(tree))
    require(
        size <= LIMIT_BYTES,
        f"{opened.path} has {size / 1e6:.1f} MB in bfloat16; a bundled model has at most "
        f"{LIMIT_BYTES / 1e6:g} MB",
    )
    about = {name: opened.source[name] for name in _KEPT if name in opened.source}
    if runs is not None:
        about[_TRAINING] = _record(opened, pathlib.Path(runs), averaged=len(every))
    with checkpoint_lib.create(path, opened.config, source=about, overwrite=True) as writer:
        for part, tree in trees.items():
            writer.add_tree(part, tree)
        writer.add_tokenizer(opened.tokenizer_path)
    return path


def _record(opened: Checkpoint, runs: pathlib.Path, *, averaged: int) -> list[card.Run]:
    """The runs that made a checkpoint, or the last of `averaged` ones."""

    def recorded(base: str) -> list[card.Run] | None:
        try:
            return open_checkpoint(base).source.get(_TRAINING)
        except UserError:  # gone since; the reports tell
            return None

    source = {name: opened.source.get(name) for name in _KEPT}
    *earlier, last = card.training(_reports(runs), source=source, recorded=recorded)
    return [*earlier, {**last, "averaged": averaged} if averaged > 1 else last]


def _load(opened: Checkpoint, part: str) -> Params:
    """A part in float32, as `Pipeline.load` would use it."""
    if part != "transformer":
        return opened.load(part, dtype=np.float32)
    params = opened.load(part if part in opened.parts else f"{part}_ema", dtype=np.float32)
    return lora.merge_stored(opened, params)


def _mean(*leaves: Any) -> np.ndarray:
    return np.stack(leaves).mean(axis=0, dtype=np.float32)


def _rounded(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(ml_dtypes.bfloat16)


def write_card(results: PathLike, destination: PathLike | None = None) -> pathlib.Path:
    """Writes the bundled model's card.

    Args:
      results: what `benchmarks/toy_model.py` wrote about it.
      destination: the bundled checkpoint; default the package's.

    Returns:
      The card's file.

    Raises:
      UserError: the measurements are of other weights, or there is no record of the training.
    """
    opened = open_checkpoint(NAME if destination is None else destination)
    measured = storage.read_json(results)
    digests = {part: opened.fingerprint(part) for part in PARTS}
    found = measured.get("checkpoints", {}).get("model", {}).get("weights")
    require(
        found == digests,
        f"{results} measures other weights than those of {opened.path}; measure these with "
        f"`python -m benchmarks.toy_model {NAME}`",
    )
    require(
        _TRAINING in opened.source,
        f"{opened.path} has no record of its training; store it with `bundle weights --runs FOLDER`",
    )
    parameters = {part: opened.parts[part].parameters for part in PARTS}
    size = sum(file.stat().st_size for file in opened.path.glob("*.safetensors"))
    file = opened.path / CARD_FILE
    with storage.new_file(file) as temporary:
        text = card.render(measured, opened.source[_TRAINING], parameters=parameters, size=size)
        temporary.write_text(text, encoding="utf-8")
    return file


def _reports(runs: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
    """The report of every finished run, by the name of its folder."""
    return {file.parent.name: storage.read_json(file) for file in sorted(runs.glob("*/report.json"))}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    weights = commands.add_parser("weights", help="store a checkpoint, or the mean of several")
    weights.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    weights.add_argument(
        "--runs", metavar="FOLDER", help="keep a record of the runs, from their reports here"
    )
    model_card = commands.add_parser("card", help="write its model card")
    model_card.add_argument("--results", required=True, metavar="FILE.json")
    for command in (weights, model_card):
        command.add_argument("--to", metavar="FOLDER", help="another place than the package")
    arguments = parser.parse_args(words)
    try:
        if arguments.command == "weights":
            path = bundle(*arguments.checkpoints, runs=arguments.runs, destination=arguments.to)
            size = sum(file.stat().st_size for file in path.iterdir())
            print(f"{path}  ({size / 1e6:.2f} MB)")
        else:
            print(write_card(arguments.results, arguments.to))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
