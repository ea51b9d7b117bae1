"""Stored cells: the numbers of one condition with one seed, in a file named by what they depend on."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longlive_jax import storage
from longlive_jax.toy.evaluation import Table

CELL_VERSION = 1
"""To be raised when the same key would give other numbers: older cells are then run again."""

FOLDER = "cells"

_SLUG_LENGTH = 80


@dataclasses.dataclass(frozen=True)
class Stored:
    """A cell read back.

    Attributes:
      table: measure to values per clip.
      seconds: what it took, compilation included.
      frames: latent frames generated, over all clips.
      config: the resolved config.
      prompts: of the first clips, each a list of the prompts of its story.
    """

    table: Table
    seconds: float
    frames: int
    config: Mapping[str, Any]
    prompts: Sequence[Sequence[str]]


def file_of(folder: pathlib.Path, label: str, key: Mapping[str, Any]) -> pathlib.Path:
    """Where the cell with this key is stored; another key is another file."""
    text = json.dumps({"version": CELL_VERSION, **key}, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return folder / FOLDER / f"{slug(label)}-seed{key['seed']}-{digest}.json"


def slug(label: str) -> str:
    """A label as a file name."""
    name = re.sub(r"[^\w.]+", "-", label).strip("-")
    if len(name) <= _SLUG_LENGTH:
        return name
    digest = hashlib.blake2b(label.encode(), digest_size=4).hexdigest()
    return f"{name[:_SLUG_LENGTH]}-{digest}"


def write(
    file: pathlib.Path,
    key: Mapping[str, Any],
    table: Table,
    *,
    seconds: float,
    frames: int,
    prompts: Sequence[Sequence[str]],
) -> None:
    """Stores a cell; it appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {name: plain(array, digits=6) for name, array in table.items()}
    facts = {"seconds": round(seconds, 2), "frames": frames, "prompts": [list(p) for p in prompts]}
    storage.write_json(file, {"version": CELL_VERSION, "key": dict(key), **facts, "table": values})


def read(file: pathlib.Path) -> Stored:
    """Reads a cell."""
    values = storage.read_json(file)
    table = {name: np.array(array, np.float64) for name, array in values["table"].items()}
    return Stored(table, values["seconds"], values["frames"], values["key"]["config"], values["prompts"])


def plain(array: Any, *, digits: int) -> Any:
    """Nested lists of rounded numbers, None for what is not a number."""
    if np.ndim(array) > 0:
        return [plain(row, digits=digits) for row in array]
    return None if np.isnan(array) else round(float(array), digits)
