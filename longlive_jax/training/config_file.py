"""From a config file to a stage's config, and from that to JSON and back."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

from longlive_jax import config_module
from longlive_jax.config_dict import from_dict, override, to_dict
from longlive_jax.errors import UserError, require
from longlive_jax.training.config import STAGES, Training, stage_of

FREE = (
    "run.folder",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep",
    "run.export_every",
    "run.keep_exports",
    "run.diverged_factor",
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
    changes = dict(changes or {})
    loaded = config_module.load_with_module(path, Training, example="configs/toy/vae.py")
    config: Training = loaded[0]
    smoke = str(changes.pop("smoke", "false")).lower()
    require(smoke in ("true", "false"), f"smoke={smoke!r} must be true or false")
    if smoke == "true":
        require(hasattr(loaded[1], "smoke"), f"config={path} has no smoke(config) that shrinks it")
        config = loaded[1].smoke(config)
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
    """Dotted names of the settings in which two `to_json` results differ, but for the `FREE` ones.

    A setting that is younger than the older of them had its default value there. `run.steps` is free where no
    learning rate depends on it.
    """
    if old.get("stage") != new.get("stage"):
        return ["stage"]
    with contextlib.suppress(UserError):  # a setting that is none here: compared as it is
        old = to_json(from_json(old))
    a, b = config_module.flatten(old["settings"]), config_module.flatten(new["settings"])
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    follows = any(
        value != "constant" and not settings.get(f"{name}_steps")
        for settings in (a, b)
        for name, value in settings.items()
        if name.endswith("optimizer.schedule")
    )
    free = FREE if follows else (*FREE, "run.steps")
    return [name for name in names if not any(name == f or name.startswith(f"{f}.") for f in free)]
