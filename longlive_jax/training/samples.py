"""What a model makes, to look at: one MP4 and one contact sheet per evaluation.

    <folder>/samples/000500.mp4    the first clips, side by side
    <folder>/samples/000500.png    frames of it with their times

The clips are those the scores were computed from, the same prompts and seeds at every evaluation.
"""

import pathlib

import numpy as np

from longlive_jax.contact_sheet import contact_sheet
from longlive_jax.video import open_writer

FOLDER = "samples"

CLIPS = 4
"""Clips that are kept of an evaluation."""


def write(folder: pathlib.Path, step: int, videos: np.ndarray, *, fps: int) -> pathlib.Path:
    """Writes the samples of one evaluation.

    Args:
      folder: the run's folder.
      step: updates made.
      videos: float `[B, V, Y, X, 3]` in [-1, 1]; the first `CLIPS` are shown.
      fps: frames per second.

    Returns:
      The contact sheet's path.
    """
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    frames = tiled(videos[:CLIPS])
    name = f"{step:06d}"
    height, width = frames.shape[1:3]
    with open_writer(target / f"{name}.mp4", fps=fps, height=height, width=width) as writer:
        writer.write(frames)
    sheet = target / f"{name}.png"
    contact_sheet(frames, path=sheet, fps=fps)
    return sheet


def tiled(videos: np.ndarray) -> np.ndarray:
    """Clips `[B, V, Y, X, 3]` in [-1, 1] in a square grid, uint8 `[V, H, W, 3]` with H and W even."""
    count, frames, height, width, _ = videos.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    pixels = np.round((np.clip(videos, -1, 1) + 1) * 127.5).astype(np.uint8)
    missing = np.zeros((rows * columns - count, *pixels.shape[1:]), np.uint8)
    grid = np.concatenate([pixels, missing]).reshape(rows, columns, frames, height, width, 3)
    grid = grid.transpose(2, 0, 3, 1, 4, 5).reshape(frames, rows * height, columns * width, 3)
    # H.264 has half the colour resolution: its sides are even.
    return np.pad(grid, ((0, 0), (0, grid.shape[1] % 2), (0, grid.shape[2] % 2), (0, 0)))
