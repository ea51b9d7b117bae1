"""What an exported model's own files have no place for: our config and the alphas of its LoRAs.

The export writes it as `longlive_jax.json` beside the files of a folder, and as the entry `longlive_jax`
of a PyTorch file; PyTorch programs pass over both. Files of others come without, and are read as ever.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from longlive_jax import storage
from longlive_jax.checkpoint import Checkpoint
from longlive_jax.config import PipelineConfig
from longlive_jax.config_dict import from_dict, to_dict
from longlive_jax.errors import UserError, require

FILE = "longlive_jax.json"
ENTRY = "longlive_jax"

_FORMAT = "longlive-jax export"
_VERSION = 1
_REMEDY = "export the model again, or remove this and say the rest with preset= and overrides="


@dataclasses.dataclass(frozen=True)
class Carried:
    """What the export said about a model.

    Attributes:
      config: of the whole model, also where only some of its parts were exported.
      alphas: of the LoRAs that were exported, by part.
      where: file or entry it was read from, for messages.
    """

    config: PipelineConfig
    alphas: Mapping[str, float]
    where: str

    @property
    def short_where(self) -> str:
        """File name or file and entry, without the folders."""
        return pathlib.PurePath(self.where).name


def contents(checkpoint: Checkpoint, parts: Collection[str]) -> dict[str, Any]:
    """The JSON object to write with an export.

    Args:
      checkpoint: what is exported.
      parts: the parts that are.
    """
    infos = {part: checkpoint.parts[part] for part in parts}
    alphas = {part: info.alpha for part, info in infos.items() if info.alpha is not None}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "config": to_dict(checkpoint.config),
        **({"alpha": alphas} if alphas else {}),
    }


def parse(values: Mapping[str, Any], *, where: str) -> Carried:
    """Reads what `contents` made.

    Raises:
      UserError: it is something else, or of another version; `where` is named.
    """
    require(
        values.get("format") == _FORMAT and values.get("version") == _VERSION,
        f"{where}: not what this version of `longlive export` writes; {_REMEDY}",
    )
    alphas = values.get("alpha", {})
    require(
        isinstance(alphas, Mapping) and all(type(a) in (int, float) and a > 0 for a in alphas.values()),
        f"{where}: alpha={alphas!r} must hold positive numbers; {_REMEDY}",
    )
    try:
        config = from_dict(PipelineConfig, values.get("config", {}))
    except UserError as error:
        raise UserError(f"{where}: {error}; {_REMEDY}") from error
    return Carried(config, {part: float(alpha) for part, alpha in alphas.items()}, where)


def beside(path: pathlib.Path) -> Carried | None:
    """What the export said in the folder that a file lies in, if it is one of ours.

    Raises:
      UserError: the file that says it is damaged.
    """
    file = path.parent / FILE
    return parse(storage.read_json(file), where=str(file)) if file.is_file() else None
