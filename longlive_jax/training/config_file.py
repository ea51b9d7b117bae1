"""From a config file to a stage's config, and from that to JSON and back."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from longlive_jax.config import from_dict, override, to_dict
from longlive_jax.errors import UserError, require
from longlive_jax.training.config import STAGES, Training, stage_of

FREE = (
    "run.folder",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep",
    "run.export_every",
    "data.threads",
    "data.prefetch",
    "flow.cache_folder",
    "mesh",
    "evaluation",
)
"""Settings that may change when a run is resumed: they do not change what is learned."""


def load_config(path: str | pathlib.Path, changes: Mapping[str, Any] | None = None) -> Training:
    """Reads a config file and applies dotted overrides.

    Args:
      path: a Python file that defines `get_config()`.
      changes: dotted names to values. The name `smoke` (true) shrinks the run to a few tiny steps with
        the file's `smoke(config)` before the other changes are made.

    Raises:
      UserError: the file, what it returns or a change is not usable.
    """
    path, changes = pathlib.Path(path), dict(changes or {})
    require(
        path.is_file() and path.suffix == ".py", f"config={path} is no Python file; try configs/toy/vae.py"
    )
    spec = importlib.util.spec_from_file_location(f"longlive_config_{path.stem}", path)
    assert spec is not None, path  # the suffix is .py
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config={path} cannot be read ({type(error).__name__}: {error})") from error
    require(hasattr(module, "get_config"), f"config={path} has no get_config()")
    config = module.get_config()
    require(
        isinstance(config, Training),
        f"config={path}: get_config() must return a config of longlive_jax.training",
    )
    smoke = str(changes.pop("smoke", "false")).lower()
    require(smoke in ("true", "false"), f"smoke={smoke!r} must be true or false")
    if smoke == "true":
        require(hasattr(module, "smoke"), f"config={path} has no smoke(config) that shrinks it")
        config = module.smoke(config)
    return override(config, changes)


def to_json(config: Training) -> dict[str, Any]:
    """A JSON-ready copy that `from_json` reads."""
    return {"stage": stage_of(config), "settings": to_dict(config)}


def from_json(values: Mapping[str, Any]) -> Training:
    """The inverse of `to_json`."""
    stage = values.get("stage")
    require(stage in STAGES, f"stage={stage!r} is not one of {', '.join(STAGES)}")
    return from_dict(STAGES[str(stage)], values["settings"])


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the settings in which two `to_json` results differ, but for the `FREE` ones."""
    if old.get("stage") != new.get("stage"):
        return ["stage"]
    a, b = _leaves(old["settings"]), _leaves(new["settings"])
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return [name for name in names if not any(name == f or name.startswith(f"{f}.") for f in FREE)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found.update(_leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return found
