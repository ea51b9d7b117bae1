"""Fetches published models from the Hugging Face hub, or from local copies of its repositories."""

import pathlib
import re
from collections.abc import Sequence

from longlive_jax.checkpoint import locate
from longlive_jax.errors import UserError
from longlive_jax.storage import PathLike

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_MODEL_FILES = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.json")


def resolve(source: PathLike) -> pathlib.Path:
    """A local path for a source: the path itself, a bundled checkpoint, or the snapshot of a hub repository.

    Raises:
      UserError: there is no such path, and no such repository that can be reached.
    """
    path = locate(source)
    if path.exists():
        return path
    if isinstance(source, str) and _REPOSITORY.match(source):
        return fetch(source, patterns=_MODEL_FILES)
    raise UserError(f"{source}: no such file or folder, and not the name of a hub repository (org/name)")


def fetch(repository: str, *, patterns: Sequence[str], source_root: PathLike | None = None) -> pathlib.Path:
    """The folder of a repository, downloaded where needed.

    Set HF_HUB_OFFLINE=1 to use what has been downloaded before and nothing else.

    Args:
      repository: "org/name".
      patterns: which files are needed, as shell patterns.
      source_root: a folder that holds `org/name/` already; nothing is downloaded then.

    Raises:
      UserError: the repository cannot be reached and is not in the local cache.
    """
    if source_root is not None:
        folder = pathlib.Path(source_root) / repository
        if not folder.is_dir():
            raise UserError(
                f"source_root={source_root}: holds no folder {repository}; copy the repository there"
            )
        return folder
    import huggingface_hub  # not needed for local files

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's, the connection's and the disk's errors share no base class
        raise UserError(
            f"{repository}: no such file or folder here, and the hub did not deliver it "
            f"({_first_line(error)}); check the name and the connection, or give a local folder"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:160]
