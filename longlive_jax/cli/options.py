"""Options that generating and interactive commands share, and what they set up."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any, get_args

from longlive_jax.cli.common import add_settings
from longlive_jax.config import DType, PipelineConfig, RopeMode, SwitchPolicy, even_steps
from longlive_jax.errors import UserError, require
from longlive_jax.inference import story as stories_lib

MOST_STEPS = 100
"""A single number up to this is how many denoising steps; above it is a timestep."""

# Options that stand for one setting of the config.
_SETTINGS = {
    "window": "window.window_frames",
    "sink": "window.sink_frames",
    "block": "window.block_frames",
    "rope": "window.rope",
    "steps": "sampler.steps",
    "opening_steps": "sampler.opening_steps",
    "policy": "switch.policy",
    "keep_sink": "switch.keep_sink",
    "fps": "video.fps",
    "dtype": "dtype",
    "vae_tile": "vae_tile",
}


def add_how(group: Any) -> None:
    """Adds the options that stand for settings of the config, and --set."""
    boolean = argparse.BooleanOptionalAction
    group.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="latent frames a block attends to, sink and block included; -1: all",
    )
    group.add_argument("--sink", type=int, metavar="N", help="first frames that stay in the window for ever")
    group.add_argument("--block", type=int, metavar="N", help="latent frames generated together")
    group.add_argument(
        "--rope",
        choices=get_args(RopeMode),
        help="frame positions: absolute, relative to the window (for videos without end), or jittered: "
        "absolute with another rotary base for every head",
    )
    group.add_argument(
        "--steps",
        type=_steps,
        metavar="N",
        help="denoising steps, evenly spread, or the timesteps themselves, falling: 4 is 1000,750,500,250",
    )
    group.add_argument(
        "--opening-steps",
        type=_steps,
        metavar="N",
        help="those of the first block, which all others follow: more of them cost a little time once "
        "(default: as the others)",
    )
    group.add_argument(
        "--policy",
        choices=get_args(SwitchPolicy),
        help="at a prompt switch: rebuild the cache under the new prompt, keep it, clear it, flush it (keep "
        "the sink and two frames), or cut (flush, and set the new scene apart in time)",
    )
    group.add_argument("--keep-sink", action=boolean, help="leave the sink alone when the cache is rebuilt")
    group.add_argument("--fps", type=int, metavar="N", help="frames per second of the file")
    group.add_argument("--dtype", choices=get_args(DType), help="precision of the computation")
    group.add_argument(
        "--vae",
        metavar="DIR",
        help="decode with the autoencoder of another checkpoint, e.g. a small one's: `longlive convert "
        "taew2_1.pth DIR` or `lightvaew2_1.safetensors DIR` (default: the checkpoint's own)",
    )
    group.add_argument(
        "--vae-tile",
        type=int,
        metavar="N",
        help="decode in squares of N pixels, for frames that do not fit in memory; the video is the same",
    )
    group.add_argument(
        "--weights", choices=("auto", "transformer", "transformer_ema"), help="which weights (default: auto)"
    )
    group.add_argument(
        "--lora", action=boolean, help="use a LoRA that the checkpoint keeps apart (default: yes)"
    )
    add_settings(group)


def _steps(word: str) -> Any:
    """A number of evenly spread steps as timesteps; anything else is left for the config to read."""
    is_number = word.isascii() and word.isdigit()
    return even_steps(int(word)) if is_number and 0 < int(word) <= MOST_STEPS else word


def add_machine(group: Any) -> None:
    """Adds what does not change the result."""
    group.add_argument(
        "--text-device",
        choices=("default", "cpu"),
        help="where the text encoder runs; cpu saves accelerator memory and is slow",
    )
    add_compile_cache(group)
    group.add_argument("--quiet", action="store_true", default=None, help="no progress")


def add_compile_cache(group: Any) -> None:
    """Adds the option that leaves out `enable_compile_cache`."""
    group.add_argument(
        "--compile-cache",
        action=argparse.BooleanOptionalAction,
        help="keep compiled programs in $LONGLIVE_CACHE or ~/.cache/longlive-jax (default: yes)",
    )


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that stand for settings, and those of --set, as dotted names."""
    found = {
        name: getattr(arguments, option)
        for option, name in _SETTINGS.items()
        if getattr(arguments, option) is not None
    }
    for name, value in arguments.settings:
        require(name not in found, f"--set {name}={value}: this setting is given twice")
        found[name] = value
    return found


def switch_frame(text: str, config: PipelineConfig) -> int:
    """Parses the value of --switch-at: `40` (latent frames) or `10s` (seconds)."""
    return stories_lib.frame_of("--switch-at", text, vae=config.vae, fps=config.video.fps)


def enable_compile_cache(wanted: bool | None = None) -> bool:
    """Keeps compiled programs on disk, so that only the first start compiles.

    Small ones too: there are hundreds beside the few large ones, and together they take as long.

    Args:
      wanted: --compile-cache or --no-compile-cache, False for the latter; None where neither is given.

    Returns:
      Whether there are any already.
    """
    if wanted is False:
        return False
    import jax

    from longlive_jax.user_cache import user_cache_dir

    folder = user_cache_dir() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def device_memory() -> Iterator[None]:
    """Says what to do when the accelerator is too small."""
    try:
        yield
    except RuntimeError as error:  # jaxlib's errors derive from it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device has too little memory; try a smaller --height, --width, --window or --batch, or "
            "--text-device cpu (`longlive memory` shows the budget)"
        ) from error
