"""The official prompt list, and the files that the scorer will look for.

Facts about the scorer (package vbench 0.1.5, `VBench.build_full_info_json` and `cli/static_filter`):

- It looks for `{prompt}-{i}.mp4`, i from 0 to 4, of every prompt of a dimension, in one folder. The suffix is
  that of the first entry of the folder, whichever that is, so nothing else may be in it.
- Its static filter takes as many videos per prompt as there are, and copies the first five that hardly move,
  renumbered, to a folder of their own; that folder is scored for temporal flickering.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.errors import UserError, require

QUALITY = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"),
    *("aesthetic_quality", "imaging_quality", "dynamic_degree"),
)
SEMANTIC = (
    *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"),
    *("appearance_style", "temporal_style", "overall_consistency"),
)
DIMENSIONS = (*QUALITY, *SEMANTIC)

FLICKERING = "temporal_flickering"

SAMPLES = 5
"""Videos per prompt."""

FLICKERING_SAMPLES = 25
"""Videos per prompt of temporal flickering, before the static filter."""

FOLDERS = ("videos", FLICKERING)
"""Where the videos of all other dimensions go, and those of temporal flickering."""

_MAX_NAME_BYTES = 255
_SEED_STRIDE = 1000  # seeds of one prompt's videos in one folder


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of the list.

    Attributes:
      text: as the list has it; files are named by it.
      dimensions: that it is scored for.
      shown: what the model is given; another text where prompts are augmented.
      position: in the list.
    """

    text: str
    dimensions: tuple[str, ...]
    shown: str
    position: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One video to make.

    Attributes:
      prompt: its prompt.
      index: its number among the prompt's.
      folder: of `FOLDERS`.
      seed: of its noise, its own.
    """

    prompt: Prompt
    index: int
    folder: str
    seed: int

    @property
    def file(self) -> str:
        """The name the scorer looks for."""
        return f"{self.prompt.text}-{self.index}.mp4"


def read_prompts(
    path: str | pathlib.Path,
    *,
    dimensions: Sequence[str] = DIMENSIONS,
    augmented: str | pathlib.Path | None = None,
) -> tuple[Prompt, ...]:
    """Reads the official list; prompts that occur twice are one, with the dimensions of both.

    Args:
      path: VBench_full_info.json of the vbench package.
      dimensions: those to keep.
      augmented: text file with, line by line, what the model is given for each entry of the list.

    Raises:
      UserError: a file is something else, or a prompt cannot be a file's name.
    """
    for name in dimensions:
        require(name in DIMENSIONS, f"--dimensions: {name!r} is unknown; choose from {', '.join(DIMENSIONS)}")
    entries = _entries(pathlib.Path(path))
    texts = [entry["prompt_en"] for entry in entries]
    shown = _lines(pathlib.Path(augmented)) if augmented else texts
    require(
        len(shown) == len(texts),
        f"--augmented={augmented} has {len(shown)} lines; {path} has {len(texts)} entries",
    )
    found: dict[str, Prompt] = {}
    for entry, text, given in zip(entries, texts, shown, strict=True):
        own = tuple(name for name in entry["dimension"] if name in dimensions)
        known = found.get(text, Prompt(text, (), given, len(found)))
        found[text] = dataclasses.replace(known, dimensions=tuple(dict.fromkeys((*known.dimensions, *own))))
    prompts = tuple(prompt for prompt in found.values() if prompt.dimensions)
    require(bool(prompts), f"{path} has no prompts for {', '.join(dimensions)}")
    for prompt in prompts:
        longest = f"{prompt.text}-{FLICKERING_SAMPLES}.mp4"
        is_name = "/" not in prompt.text and "\0" not in prompt.text and not prompt.text.startswith(".")
        require(
            is_name and len(longest.encode()) <= _MAX_NAME_BYTES,
            f"{path}: the prompt {prompt.text!r} cannot be the name of a file, which the scorer wants",
        )
    return prompts


def _entries(path: pathlib.Path) -> list[Mapping[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"prompts={path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(
            f"prompts={path} is not JSON; give VBench_full_info.json of the vbench package"
        ) from error
    is_list = isinstance(values, list) and all(
        isinstance(v, dict) and isinstance(v.get("prompt_en"), str) and isinstance(v.get("dimension"), list)
        for v in values
    )
    require(is_list and bool(values), f"prompts={path} is not VBench_full_info.json of the vbench package")
    return list(values)


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").strip().splitlines()]
    except OSError as error:
        raise UserError(f"--augmented={path} cannot be read ({error.strerror})") from error


def samples(
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    count: int = SAMPLES,
    flickering_count: int = FLICKERING_SAMPLES,
) -> list[Sample]:
    """Every video to make, each with a seed of its own that depends on its place in the list alone.

    Args:
      prompts: of `read_prompts`.
      seed: of the first prompt's first video.
      count: videos per prompt, at most 1000.
      flickering_count: videos per prompt of temporal flickering; 0 makes `count` of them, among the others,
        for a scorer that filters by itself.
    """
    found: list[Sample] = []
    for prompt in prompts:
        others = [name for name in prompt.dimensions if name != FLICKERING or flickering_count == 0]
        parts = [(FOLDERS[0], count if others else 0)]
        parts.append((FOLDERS[1], flickering_count if FLICKERING in prompt.dimensions else 0))
        for part, (folder, number) in enumerate(parts):
            first = seed + _SEED_STRIDE * (len(parts) * prompt.position + part)
            found += [Sample(prompt, i, folder, first + i) for i in range(number)]
    return found
