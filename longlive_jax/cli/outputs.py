"""The files of one generated video: their names, and writing them while blocks arrive."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from longlive_jax import video as video_lib
from longlive_jax.errors import require

if TYPE_CHECKING:
    from longlive_jax.cli.request import Request

LATENTS_SUFFIX = ".npy"
SLUG_LENGTH = 40


class Target:
    """The files of one video.

    Attributes:
      out: the video, or the latents where its suffix is .npy.
      latents: where the latents go, or None.
      sheet: where the contact sheet goes, or None.
      sidecar: the JSON file.
    """

    def __init__(self, out: str, *, latents: str | None, sheet: str | None, sidecar: pathlib.Path) -> None:
        self.is_latents_only = out.endswith(LATENTS_SUFFIX)
        self.out, self.latents, self.sheet, self.sidecar = out, latents, sheet, sidecar
        if self.is_latents_only:
            require(sheet is None, f"--sheet needs a video, and --out={out} asks for latents only")
            require(latents is None, f"--out={out} and --latents both ask for latents; give one of them")
            self.latents = out

    @property
    def paths(self) -> list[str | pathlib.Path]:
        """Every file that will be written."""
        named = (None if self.is_latents_only else self.out, self.latents, self.sheet, self.sidecar)
        return [path for path in named if path is not None]

    @contextlib.contextmanager
    def open(self, request: "Request") -> Iterator["Writers"]:
        """Opens the video's files; they are finished on interruption and discarded on failure."""
        config = request.config
        latent_size = config.latent_size(request.height, request.width)
        with contextlib.ExitStack() as stack:
            frames = latents = None
            if not self.is_latents_only:
                frames = stack.enter_context(
                    video_lib.open_writer(
                        self.out, fps=config.video.fps, height=request.height, width=request.width
                    )
                )
            if self.latents is not None:
                shape = (*latent_size, config.transformer.latent_channels)
                latents = stack.enter_context(video_lib.ArrayWriter(self.latents, shape=shape))
            yield Writers(frames, latents)


class Writers:
    """The open files of one video."""

    def __init__(self, frames: video_lib.VideoWriter | None, latents: video_lib.ArrayWriter | None) -> None:
        self.frames, self.latents = frames, latents

    def write(self, frames: np.ndarray | None, latents: np.ndarray) -> None:
        """Appends a block: uint8 [v, Y, X, 3] and float32 [n, h, w, C]."""
        if self.frames is not None and frames is not None:
            self.frames.write(frames)
        if self.latents is not None:
            self.latents.write(latents)

    def close(self) -> None:
        for writer in (self.frames, self.latents):
            if writer is not None:
                writer.close()


def numbered(path: str, index: int, count: int) -> str:
    """`path` for video `index` of `count`: unchanged for one, else with a number before the suffix."""
    if count == 1:
        return path
    suffix = "/" if path.endswith("/") else pathlib.Path(path).suffix
    return f"{path.removesuffix(suffix) if suffix else path}-{index:0{len(str(count - 1))}d}{suffix}"


def sidecar_path(out: str) -> pathlib.Path:
    """`x.mp4` to `x.json`; a folder `x/` to `x.json` beside it."""
    return pathlib.Path(out).with_suffix(".json")


def check_free(paths: Sequence[str | pathlib.Path], *, overwrite: bool) -> None:
    """Refuses to replace a file unless asked to, and two results under one name."""
    names = [os.path.abspath(path) for path in paths]
    doubled = next((name for name in names if names.count(name) > 1), None)
    require(doubled is None, f"{doubled} would be written twice; choose different names")
    for path in paths:
        require(
            overwrite or not os.path.lexists(path),
            f"{path} exists already; choose another name or add --overwrite",
        )


def slug(text: str) -> str:
    """A file name that reminds of a prompt."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")
    return words[:SLUG_LENGTH].rstrip("-_") or "video"
