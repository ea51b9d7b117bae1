"""Contact sheets: one PNG that shows what happens in a video, with times and prompts."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlive_jax import storage
from longlive_jax.errors import require
from longlive_jax.video import iter_video, read_fps

_CELL_WIDTHS = (160, 320)
_CAPTION_LINES = 2


def contact_sheet(
    source: np.ndarray | str | os.PathLike[str],
    *,
    path: str | os.PathLike[str],
    columns: int = 4,
    count: int = 12,
    fps: float | None = None,
    labels: Sequence[tuple[int, str]] = (),
) -> None:
    """Writes a PNG that shows evenly spaced frames of a video with their times.

    Args:
      source: frames, uint8 [V, Y, X, 3], or the path of a video (read frame by frame).
      path: the PNG to write.
      columns: frames per row.
      count: frames shown in all (fewer if the video is shorter), the first and the last among them.
      fps: frames per second; read from the file where it says so.
      labels: (first video frame, text) pairs, in order: each text is shown from its frame on.

    Raises:
      UserError: `path` is not a .png or cannot be written, or `fps` is unknown.
    """
    target = pathlib.Path(path)
    require(target.suffix.lower() == ".png", f"sheet={path} must end in .png")
    require(target.parent.is_dir(), f"sheet={path}: the folder {target.parent} does not exist; create it")
    require(columns > 0 and count > 0, f"columns={columns} and count={count} must be positive")
    if fps is None:
        is_file = not isinstance(source, np.ndarray) and pathlib.Path(source).is_file()
        require(is_file, "fps is needed: an array or a folder of frames does not say its rate")
        fps = read_fps(source)  # type: ignore[arg-type]

    chosen = _evenly_spaced(source, count)
    height, width = chosen[0][1].shape[:2]
    cell_width = min(max(width, _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    cells = [
        _cell(frame, width=cell_width, height=round(height * cell_width / width), caption=caption)
        for frame, caption in zip(
            [frame for _, frame in chosen], [_caption(i, fps, labels) for i, _ in chosen], strict=True
        )
    ]
    sheet = _grid(cells, columns)
    with storage.new_file(target) as temporary:
        sheet.save(temporary, format="PNG")


def _evenly_spaced(source: Any, count: int) -> list[tuple[int, np.ndarray]]:
    """(index, frame) of at most `count` frames, ends included. A file is read twice, never held."""
    is_array = isinstance(source, np.ndarray)
    total = len(source) if is_array else sum(1 for _ in iter_video(source))
    require(total > 0, "frames: a contact sheet needs at least one frame")
    wanted = sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})
    if is_array:
        return [(i, source[i]) for i in wanted]
    return [(i, frame) for i, frame in enumerate(iter_video(source)) if i in set(wanted)]


def _caption(index: int, fps: float, labels: Sequence[tuple[int, str]]) -> str:
    text = next((label for start, label in reversed(labels) if start <= index), "")
    return f"{index / fps:.2f} s  {text}".rstrip()


def _cell(frame: np.ndarray, *, width: int, height: int, caption: str) -> Any:
    """One frame above its caption, as a PIL image."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    font = PIL.ImageFont.load_default(12)
    small = frame.shape[1] < width
    resample = PIL.Image.Resampling.NEAREST if small else PIL.Image.Resampling.LANCZOS
    picture = PIL.Image.fromarray(frame).resize((width, height), resample)
    cell = PIL.Image.new("RGB", (width, height + 15 * _CAPTION_LINES + 3), "white")
    cell.paste(picture, (0, 0))
    draw = PIL.ImageDraw.Draw(cell)
    for i, line in enumerate(_wrapped(caption, draw, font, width - 4)):
        draw.text((2, height + 1 + 15 * i), line, fill="black", font=font)
    return cell


def _wrapped(text: str, draw: Any, font: Any, width: int) -> list[str]:
    """Breaks `text` into at most `_CAPTION_LINES` lines of `width` pixels, cut off with three dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _CAPTION_LINES:
        lines = lines[:_CAPTION_LINES]
        while lines[-1] and draw.textlength(f"{lines[-1]}...", font=font) > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


def _grid(cells: Sequence[Any], columns: int) -> Any:
    """Lays cells of one size out in rows, 4 pixels apart."""
    import PIL.Image

    gap = 4
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = cells[0].size
    sheet = PIL.Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet
