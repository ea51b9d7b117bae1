"""What conversion, export and inspection return; `str(report)` is what the command line prints."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

from longlive_jax.config import PipelineConfig

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (part, bytes written so far, bytes in all) while files are written."""


@dataclasses.dataclass(frozen=True)
class PartReport:
    """One part that was read, written or found.

    Attributes:
      part: "transformer", "vae", ...
      origin: the file it comes from, with the entry inside the file where there is one.
      layout: whose names and shapes: "wan", "diffusers", "transformers", "peft" or "longlive-jax".
      tensors: number of tensors on the source's side.
      parameters: number of parameters.
      dtype: precision, "+"-joined where tensors differ.
      rank: for a LoRA, its rank.
    """

    part: str
    origin: str
    layout: str
    tensors: int
    parameters: int
    dtype: str
    rank: int | None = None

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank is not None else ""
        return (
            f"{self.part:<16} {self.parameters:>15,} parameters in {self.tensors} tensors, {self.dtype}"
            f"{rank}  ({self.layout}, {self.origin})"
        )


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Something a source holds that was not used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"left out: {self.name} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """Result of a conversion.

    Attributes:
      path: the checkpoint directory.
      config: the config stored in it.
      parts: what it holds now.
      left_out: what the sources held besides.
      notes: things worth knowing, one line each.
      bytes_written: size of the tensors.
      seconds: wall time.
    """

    path: pathlib.Path
    config: PipelineConfig
    parts: Sequence[PartReport]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]
    bytes_written: int
    seconds: float

    def __str__(self) -> str:
        size = f"{self.bytes_written / 1e9:.2f} GB in {self.seconds:.1f} s"
        return "\n".join(
            [f"wrote {self.path} ({size})", *_lines(self.parts), *_lines(self.left_out), *_notes(self.notes)]
        )


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
      files: what was written.
      parts: what the files hold.
      notes: things worth knowing, one line each.
      left_out: what the checkpoint holds besides.
    """

    files: Sequence[pathlib.Path]
    parts: Sequence[PartReport]
    notes: Sequence[str] = ()
    left_out: Sequence[LeftOut] = ()

    def __str__(self) -> str:
        return "\n".join(
            [
                *(f"wrote {file}" for file in self.files),
                *_lines(self.parts),
                *_lines(self.left_out),
                *_notes(self.notes),
            ]
        )


@dataclasses.dataclass(frozen=True)
class InspectReport:
    """What a file, folder or checkpoint holds.

    Attributes:
      path: what was inspected.
      layout: "longlive-jax" for our directory, else the layouts found, "+"-joined.
      parts: the parts found.
      left_out: what conversion would leave out.
      shapes: inferred settings, one line per part ("transformer: dim=1536 ...").
      notes: things worth knowing, one line each (an ambiguity, a missing tokenizer, ...).
    """

    path: pathlib.Path
    layout: str
    parts: Sequence[PartReport]
    left_out: Sequence[LeftOut]
    shapes: Sequence[str]
    notes: Sequence[str]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.path}: {self.layout}",
                *_lines(self.parts),
                *_lines(self.shapes),
                *_lines(self.left_out),
                *_notes(self.notes),
            ]
        )


@dataclasses.dataclass(frozen=True)
class SetupReport:
    """Result of fetching and converting a published model.

    Attributes:
      convert: the conversion's report.
      next_command: what to run next.
    """

    convert: ConvertReport
    next_command: str

    def __str__(self) -> str:
        return f"{self.convert}\nnext: {self.next_command}"


def _lines(items: Sequence[object]) -> list[str]:
    return [f"  {item}" for item in items]


def _notes(notes: Sequence[str]) -> list[str]:
    return [f"  note: {note}" for note in notes]
