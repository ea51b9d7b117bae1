"""The settings a page may turn, and how far."""

from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.config import PipelineConfig
from longlive_jax.errors import require
from longlive_jax.serve.settings import MAX_STEPS, PROMPT_CHARS
from longlive_jax.session import Recording
from longlive_jax.session.recording import ChangeEvent


def shown(config: PipelineConfig) -> dict[str, Any]:
    """The settings a page shows."""
    return {
        "window": config.window.window_frames,
        "sink": config.window.sink_frames,
        "steps": list(config.sampler.steps),
        "opening_steps": list(config.sampler.opening_steps),
        "policy": config.switch.policy,
        "keep_sink": config.switch.keep_sink,
    }


def limits(config: PipelineConfig) -> dict[str, int]:
    """How far the knobs turn: a window beyond twice the checkpoint's is neither trained nor bounded."""
    window = config.window
    return {
        "window": max(2 * window.window_frames, window.sink_frames + window.block_frames),
        "sink": window.sink_frames,
        "block": window.block_frames,
        "prompt": PROMPT_CHARS,
    }


def describe(settings: Mapping[str, Any], *, other: Sequence[Mapping[str, Any]]) -> str:
    """A side of a comparison by what sets it apart."""
    apart = {
        name: value for name, value in settings.items() if any(side.get(name) != value for side in other)
    }
    parts = [_spoken(name, value) for name, value in apart.items()]
    return ", ".join(parts) or "as it is"


def _spoken(name: str, value: Any) -> str:
    last = name.split(".")[-1].removesuffix("_frames").replace("_", " ")
    if last == "policy":
        return str(value)
    if isinstance(value, bool):
        return last if value else f"no {last}"
    return f"{last} {len(value) if isinstance(value, tuple) else value}"


def check(settings: Mapping[str, Any], config: PipelineConfig) -> None:
    """Refuses settings (dotted names) beyond the limits of a studio with this config."""
    most, frames = limits(config)["window"], settings.get("window.window_frames", 0)
    require(frames <= most, f"window={frames}: this studio gives at most {most} frames")
    for name in ("steps", "opening_steps"):
        steps = settings.get(f"sampler.{name}", ())
        require(len(steps) <= MAX_STEPS, f"{name}: {len(steps)} are too many; at most {MAX_STEPS} are taken")


def check_recording(recording: Recording, config: PipelineConfig) -> None:
    """Refuses a session file that asks for more than a studio with this config gives."""
    own, window = config.video, recording.config.window
    require(
        (recording.height, recording.width) == (own.height, own.width),
        f"the session is {recording.width}x{recording.height}, this studio {own.width}x{own.height}",
    )
    sampler = recording.config.sampler
    asked = {"sampler.steps": sampler.steps, "sampler.opening_steps": sampler.opening_steps}
    check({"window.window_frames": window.window_frames, **asked}, config)
    prompts = [recording.prompt, *(getattr(event, "prompt", "") for event in recording.events)]
    require(
        all(len(prompt) <= PROMPT_CHARS for prompt in prompts),
        f"a prompt of the session has more than {PROMPT_CHARS} characters",
    )
    for event in recording.events:
        if isinstance(event, ChangeEvent):
            check(event.settings, config)
