"""Real-time, interactive, long video generation in JAX: LongLive and beyond.

    from longlive_jax import Pipeline

    pipe = Pipeline.load("checkpoints/longlive-1.3b")
    pipe("A red fox runs through snow.", frames=21).save("fox.mp4")

The public names are loaded when they are first used, so importing the package costs nothing and
touches no device.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlive_jax.config import PipelineConfig as PipelineConfig
    from longlive_jax.config import preset as preset
    from longlive_jax.errors import UserError as UserError
    from longlive_jax.inference.pipeline import Pipeline as Pipeline
    from longlive_jax.inference.story import PromptSwitch as PromptSwitch
    from longlive_jax.inference.story import Story as Story
    from longlive_jax.session.session import Session as Session

    __version__: str

_MODULES = {
    "Pipeline": "longlive_jax.inference.pipeline",
    "PipelineConfig": "longlive_jax.config",
    "PromptSwitch": "longlive_jax.inference.story",
    "Session": "longlive_jax.session.session",
    "Story": "longlive_jax.inference.story",
    "UserError": "longlive_jax.errors",
    "preset": "longlive_jax.config",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    try:
        return importlib.metadata.version("longlive-jax")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return "unknown"
