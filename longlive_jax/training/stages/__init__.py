"""One module per stage of the recipe; each has `train(config, ...)`, a loop to be read top to bottom."""

import importlib
from typing import Any

from longlive_jax.training.config import Training, stage_of
from longlive_jax.training.loop import Resume


def train(config: Training, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Runs the stage a config is for; returns its report."""
    # Stages are imported when they run: each brings its own part of the package.
    module = importlib.import_module(f"{__name__}.{stage_of(config)}")
    return module.train(config, resume=resume, is_quiet=is_quiet)
