"""Where things are kept between runs: prompt embeddings and compiled programs."""

import os
import pathlib
import sys
from collections.abc import Mapping

VARIABLE = "LONGLIVE_CACHE"
"""Environment variable that names another folder."""

NAME = "longlive-jax"


def user_cache_dir(platform: str = sys.platform, variables: Mapping[str, str] = os.environ) -> pathlib.Path:
    """`$LONGLIVE_CACHE`, or what the platform says caches of a user belong in.

    That is `~/Library/Caches/longlive-jax` on macOS, `%LOCALAPPDATA%\\longlive-jax\\Cache` on Windows, and
    `$XDG_CACHE_HOME/longlive-jax` or `~/.cache/longlive-jax` elsewhere.

    Args:
      platform: as in `sys.platform`.
      variables: the environment.
    """
    if variables.get(VARIABLE):
        return pathlib.Path(variables[VARIABLE]).expanduser()
    if platform == "darwin":
        return pathlib.Path("~/Library/Caches").expanduser() / NAME
    if platform == "win32":
        local = variables.get("LOCALAPPDATA") or "~/AppData/Local"
        return pathlib.Path(local).expanduser() / NAME / "Cache"
    return pathlib.Path(variables.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / NAME
