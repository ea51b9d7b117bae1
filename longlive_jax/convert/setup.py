"""Fetches a published model and converts it: one call from nothing to a checkpoint directory."""

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping, Sequence

from longlive_jax import checkpoint, storage
from longlive_jax.config import DType
from longlive_jax.convert import hub
from longlive_jax.convert.convert import LoraMode, convert
from longlive_jax.convert.reports import Progress, SetupReport
from longlive_jax.errors import UserError, require
from longlive_jax.storage import PathLike


@dataclasses.dataclass(frozen=True)
class Repository:
    """What a model needs of a hub repository; later repositories win where parts coincide.

    Attributes:
      name: "org/name".
      files: the files to fetch.
      sources: what to convert, relative to the repository ("" is its folder).
    """

    name: str
    files: Sequence[str]
    sources: Sequence[str]


_WAN_1_3B = Repository(
    "Wan-AI/Wan2.1-T2V-1.3B",
    # Without its transformer: LongLive's file holds all of those weights.
    ("config.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"),
    sources=("",),
)
_LONGLIVE_FILES = ("models/longlive_base.pt", "models/lora.pt")

MODELS: Mapping[str, Sequence[Repository]] = {
    "longlive-1.3b": (
        _WAN_1_3B,
        Repository("Efficient-Large-Model/LongLive-1.3B", _LONGLIVE_FILES, sources=_LONGLIVE_FILES),
    ),
}
"""Published models by the name that `setup` takes."""


def setup(
    name: str,
    destination: PathLike,
    *,
    source_root: PathLike | None = None,
    dtype: DType | None = None,
    lora: LoraMode = "merge",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SetupReport:
    """Fetches the files of a published model and converts them.

    Args:
      name: a name of `MODELS`.
      destination: the checkpoint directory to make.
      source_root: a folder with local copies of the repositories, `org/name/...`; None downloads.
      dtype: see `convert`.
      lora: see `convert`.
      overwrite: see `convert`.
      progress: see `convert`.

    Returns:
      The conversion's report and what to run next.

    Raises:
      UserError: the name is unknown, a file is missing, or the conversion fails.
    """
    if name not in MODELS:
        raise UserError(f"model={name!r} is unknown; choose one of {', '.join(MODELS)}")
    target = pathlib.Path(destination)
    # Before gigabytes are fetched for nothing.
    storage.check_destination(target, overwrite=overwrite, replaceable=checkpoint.is_checkpoint)
    sources: list[pathlib.Path] = []
    for repository in MODELS[name]:
        folder = hub.fetch(repository.name, patterns=repository.files, source_root=source_root)
        for file in repository.files:
            require((folder / file).is_file(), f"{folder / file}: missing; fetch {repository.name} again")
        sources += [folder / source for source in repository.sources]
    report = convert(sources, target, dtype=dtype, lora=lora, overwrite=overwrite, progress=progress)
    command = f'longlive generate --checkpoint {shlex.quote(str(target))} --prompt "..."'
    return SetupReport(report, command)
