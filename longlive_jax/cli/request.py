"""What `longlive generate` is asked to do, resolved and checked, and the sidecar that records it.

A `Request` says everything that decides the frames. It is built from the command line or from the
JSON file that an earlier run left beside its video; both ways lead through the same checks, before
any weights are read.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import longlive_jax
from longlive_jax import config as configs
from longlive_jax import config_dict
from longlive_jax.checkpoint import Checkpoint, open_checkpoint
from longlive_jax.config import PipelineConfig
from longlive_jax.errors import UserError, require
from longlive_jax.inference import story as stories_lib
from longlive_jax.inference.story import Story
from longlive_jax.provenance import differences, fingerprints, generation_settings, place, versions
from longlive_jax.storage import read_json, write_json

SIDECAR = "longlive-jax generate"
SIDECAR_VERSION = 1
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """Videos to generate.

    Attributes:
      checkpoint: the open checkpoint directory.
      config: the resolved config.
      overrides: what turns the checkpoint's config into it.
      stories: one per video.
      frames: latent frames of each video.
      seed: of the first video; the next ones count up.
      height: pixels.
      width: pixels.
      weights: which weights of the checkpoint, see `Pipeline.load`.
      use_lora: whether a LoRA kept apart is used.
      vae: another checkpoint that the autoencoder comes from.
    """

    checkpoint: Checkpoint
    config: PipelineConfig
    overrides: Mapping[str, Any]
    stories: tuple[Story, ...]
    frames: int
    seed: int
    height: int
    width: int
    weights: str = "auto"
    use_lora: bool = True
    vae: Checkpoint | None = None

    def __post_init__(self) -> None:
        config = self.config
        require(self.frames > 0, f"frames={self.frames} must be at least 1")
        last = self.seed + len(self.stories) - 1
        require(self.seed >= 0 and last <= MAX_SEED, f"seed={self.seed} must be in [0, {MAX_SEED}]")
        config.latent_size(self.height, self.width)
        config.window.cache_frames(self.frames)
        for story in self.stories:
            stories_lib.check_schedule(story, frames=self.frames, block_frames=config.window.block_frames)

    @property
    def video_frames(self) -> int:
        """Frames of each video."""
        return self.config.vae.video_frames(self.frames)

    def check_parts(self, *, needs_vae: bool) -> None:
        """Refuses a checkpoint that lacks what the request needs."""
        wanted = "transformer" if self.weights == "auto" else self.weights
        if self.weights == "auto" and "transformer" not in self.checkpoint.parts:
            wanted = "transformer_ema"
        self.checkpoint.part_file(wanted)
        if needs_vae:
            (self.vae or self.checkpoint).part_file("vae")


def open_config(
    path: str, overrides: Mapping[str, Any], *, vae: str | None = None
) -> tuple[Checkpoint, PipelineConfig]:
    """Opens a checkpoint (its config.json alone) and resolves its config.

    Args:
      path: the checkpoint.
      overrides: dotted settings.
      vae: another checkpoint whose autoencoder is used.
    """
    checkpoint = open_checkpoint(path)
    config = config_dict.override(checkpoint.config, overrides)
    if vae is not None:
        config = configs.with_vae(config, open_checkpoint(vae, field="--vae").config, vae)
    return checkpoint, config


def default_frames(config: PipelineConfig, *, frames: int | None, seconds: float | None) -> int:
    """Latent frames from `--frames` or `--seconds`; five seconds where neither is given."""
    if frames is not None:
        return frames
    wanted = 5.0 if seconds is None else seconds
    require(wanted > 0, f"seconds={seconds} must be positive")
    return stories_lib.frames_from_seconds(wanted, vae=config.vae, fps=config.video.fps)


# --- the sidecar ------------------------------------------------------------------------------------


def write_sidecar(
    path: pathlib.Path, request: Request, index: int, *, video: Mapping[str, Any], timings: Mapping[str, Any]
) -> None:
    """Writes what reproduces video `index` of `request`.

    Args:
      path: the JSON file.
      request: the request.
      index: which of its videos.
      video: facts about the file that was written.
      timings: seconds and rates; they do not decide anything.
    """
    checkpoint = request.checkpoint
    write_json(
        path,
        {
            "format": SIDECAR,
            "version": SIDECAR_VERSION,
            "video": dict(video),
            "request": {
                "checkpoint": place(checkpoint.path),
                "weights": request.weights,
                "use_lora": request.use_lora,
                "vae": None if request.vae is None else place(request.vae.path),
                "story": stories_lib.to_dict(request.stories[index]),
                "frames": request.frames,
                "seed": request.seed + index,
                "height": request.height,
                "width": request.width,
                "overrides": dict(request.overrides),
            },
            "config": config_dict.to_dict(request.config),
            "weights": fingerprints(checkpoint, vae=request.vae),
            "versions": {"longlive-jax": longlive_jax.__version__, **versions()},
            "timings": dict(timings),
        },
    )


def read_sidecar(path: str, *, checkpoint: str | None) -> tuple[Request, list[str]]:
    """Rebuilds the request that a sidecar records.

    Args:
      path: the JSON file.
      checkpoint: a checkpoint directory to use instead of the recorded one.

    Returns:
      The request, and remarks on what may make the result differ.

    Raises:
      UserError: the file is no sidecar, or the checkpoint holds other weights.
    """
    values = read_json(path)
    require(
        values.get("format") == SIDECAR and values.get("version") == SIDECAR_VERSION,
        f"from={path} is not the JSON file that `longlive generate` leaves beside a video",
    )
    try:
        recorded, config = values["request"], values["config"]
        overrides = generation_settings(config)
        folder = checkpoint or recorded["checkpoint"]
        small = recorded.get("vae")  # younger than some sidecars
        opened, resolved = open_config(folder, overrides, vae=small)
        vae, fps = resolved.vae, resolved.video.fps
        story = stories_lib.from_dict(recorded["story"], vae=vae, fps=fps)
        request = Request(
            checkpoint=opened,
            config=resolved,
            overrides=overrides,
            stories=(story,),
            vae=None if small is None else open_checkpoint(small, field="vae"),
            **{k: recorded[k] for k in ("frames", "seed", "height", "width", "weights", "use_lora")},
        )
        remarks = differences(values, fingerprints(opened, vae=request.vae), resolved)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"from={path} is damaged: {type(error).__name__} {error}; generate anew") from error
    if checkpoint is None and remarks:
        raise UserError(
            f"{folder}: {remarks[0]}, so the video cannot be reproduced; name the right one with --checkpoint"
        )
    return request, remarks
