"""Draws scenes as video with analytic signed distances: antialiased, exact at any frame number.

The sprite's place is a closed form of the frame number, so a long video can be rendered piece by
piece, and a switched story continues the place, size, shade and gradient while what the prompt names
changes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.errors import require
from longlive_jax.toy.world import (
    BACKGROUND,
    BACKGROUNDS,
    COLOUR,
    COLOURS,
    MOTION,
    MOTIONS,
    SHAPE,
    SHAPES,
    Scenes,
    World,
)

_HALF_SIDE = np.sqrt(np.pi) / 2  # square of the area of the unit disc
_INRADIUS = np.sqrt(np.pi / (3 * np.sqrt(3)))  # equilateral triangle of that area
_HOLE = 0.5  # inner over outer radius of the ring
_OUTER = 1 / np.sqrt(1 - _HOLE**2)  # outer radius of the ring of that area

Drawing = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""Coverage `[n, Y, X]` of a sprite from `(dx [n, X], dy [n, Y], size)`, as `coverage` for a shape."""

_CHUNK = 16  # frames drawn together: the working set stays in the second-level cache

COLOUR_TABLE = np.array(list(COLOURS.values()), np.float32)  # [4, 3]
BACKGROUND_TABLE = np.array(list(BACKGROUNDS.values()), np.float32)  # [3, 3]
MOTION_TABLE = np.array(list(MOTIONS.values()), np.float64)  # [5, 2]


@dataclasses.dataclass(frozen=True)
class Story:
    """Which attributes hold when, for a batch of scenes.

    Attributes:
      starts: first frame of every segment; rises from 0.
      codes: attributes of every segment, int [B, segments, 4].
    """

    starts: tuple[int, ...]
    codes: np.ndarray

    def __post_init__(self) -> None:
        require(
            len(self.starts) > 0
            and self.starts[0] == 0
            and all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False)),
            f"story.starts={self.starts} must begin with 0 and rise",
        )
        require(
            self.codes.ndim == 3 and self.codes.shape[1:] == (len(self.starts), 4),
            f"story.codes has shape {self.codes.shape}; it must be [batch, {len(self.starts)}, 4]",
        )

    def at(self, frames: int, *, first_frame: int = 0) -> np.ndarray:
        """Attributes of every frame of a span, int [B, V, 4]."""
        frame = np.arange(first_frame, first_frame + frames)
        return self.codes[:, np.searchsorted(self.starts, frame, side="right") - 1]


def render(
    world: World,
    scenes: Scenes,
    *,
    frames: int,
    first_frame: int = 0,
    drawings: Sequence[Drawing | None] | None = None,
) -> np.ndarray:
    """Renders clips in which the attributes do not change.

    Args:
      world: geometry.
      scenes: the B scenes.
      frames: video frames V to render.
      first_frame: number of the first one (a long video may be rendered in pieces).
      drawings: B drawings, each instead of the shape that the scene asks for; None draws that shape.

    Returns:
      Video [B, V, Y, X, 3], float32 in [-1, 1].
    """
    story = Story(starts=(0,), codes=scenes.codes[:, None])
    return render_story(world, scenes, story, frames=frames, first_frame=first_frame, drawings=drawings)


def render_story(
    world: World,
    scenes: Scenes,
    story: Story,
    *,
    frames: int,
    first_frame: int = 0,
    drawings: Sequence[Drawing | None] | None = None,
) -> np.ndarray:
    """Renders clips whose prompted attributes change at given frames; everything else continues.

    Args:
      world: geometry.
      scenes: the B scenes; their `codes` are not used.
      story: the attributes over time.
      frames: video frames V to render.
      first_frame: number of the first one.
      drawings: see `render`.

    Returns:
      Video [B, V, Y, X, 3], float32 in [-1, 1].

    Raises:
      UserError: no frames, a negative first frame, or a story of another batch size.
    """
    require(frames > 0, f"frames={frames} must be positive")
    require(first_frame >= 0, f"first_frame={first_frame} must be 0 or more")
    require(
        len(scenes) == len(story.codes), f"story has {len(story.codes)} clips and scenes has {len(scenes)}"
    )
    centres = story_centres(world, scenes, story, frames=frames, first_frame=first_frame)
    video = np.empty((len(scenes), frames, world.height, world.width, 3), np.float32)
    # Spans of constant attributes, cut further into chunks.
    cuts = sorted({0, frames, *(s - first_frame for s in story.starts if 0 < s - first_frame < frames)})
    for begin, end in itertools.pairwise(cuts):
        codes = story.at(1, first_frame=first_frame + begin)[:, 0]
        for clip in range(len(scenes)):
            background, sprite = _colours(world, scenes, clip, codes[clip])
            shape = functools.partial(coverage, int(codes[clip, SHAPE]))
            draw = (drawings[clip] if drawings is not None else None) or shape
            contrast = sprite - background
            for at in range(begin, end, _CHUNK):
                to = min(at + _CHUNK, end)
                dx, dy = offsets(world, centres[clip, at:to])
                alpha = draw(dx, dy, scenes.size[clip])
                np.multiply(alpha[..., None], contrast, out=video[clip, at:to])
                video[clip, at:to] += background
    return video


def story_centres(
    world: World, scenes: Scenes, story: Story, *, frames: int, first_frame: int = 0
) -> np.ndarray:
    """Centres (x, y) of the sprites, float64 [B, V, 2] in pixels, wrapped into the frame."""
    frame = np.arange(first_frame, first_frame + frames)
    ends: Sequence[float] = (*story.starts[1:], np.inf)
    travelled = np.zeros((len(scenes), frames, 2))
    for segment, (start, end) in enumerate(zip(story.starts, ends, strict=True)):
        elapsed = np.clip(frame, start, end) - start  # frames spent in this segment
        velocity = world.speed * MOTION_TABLE[story.codes[:, segment, MOTION]]  # [B, 2]
        travelled += velocity[:, None] * elapsed[:, None]
    return np.mod(scenes.start[:, None] + travelled, (world.width, world.height))


def _colours(world: World, scenes: Scenes, clip: int, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Background [Y, X, 3] and sprite [3] of one clip, float32 in [-1, 1]."""
    u, v = unit_coordinates(world)
    right, down = scenes.gradient[clip].astype(np.float32)
    plane = right * u[None, :] + down * v[:, None]  # [Y, X]
    background = np.clip(BACKGROUND_TABLE[codes[BACKGROUND]] + plane[..., None], 0, 1)
    sprite = np.float32(scenes.shade[clip]) * COLOUR_TABLE[codes[COLOUR]]
    return background * 2 - 1, sprite * 2 - 1


def unit_coordinates(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres across [X] and down [Y] the frame, float32 in (-1, 1)."""
    across = (np.arange(world.width, dtype=np.float32) + 0.5) * 2 / world.width - 1
    down = (np.arange(world.height, dtype=np.float32) + 0.5) * 2 / world.height - 1
    return across, down


def offsets(world: World, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shortest way around the torus from each centre [n, 2] to the pixel columns and rows.

    Returns:
      dx [n, X] and dy [n, Y], float32 pixels in [-side / 2, side / 2).
    """
    x = np.arange(world.width) + 0.5 - centres[:, :1]
    y = np.arange(world.height) + 0.5 - centres[:, 1:]
    return wrap(x, world.width).astype(np.float32), wrap(y, world.height).astype(np.float32)


def wrap(distance: np.ndarray, period: float | np.ndarray) -> np.ndarray:
    """Moves distances on a circle of length `period` into [-period / 2, period / 2)."""
    return np.mod(distance + period / 2, period) - period / 2


def signed_distance(shape: int, dx: np.ndarray, dy: np.ndarray, size: float | np.ndarray) -> np.ndarray:
    """Signed distance to a shape's edge in pixels, negative inside.

    Exact inside and along the edges; outside a corner it is the distance to the nearest edge's line,
    which antialiasing cannot tell apart.

    Args:
      shape: code of the shape.
      dx: columns relative to the centroid, float32 [n, X] pixels.
      dy: rows relative to the centroid, float32 [n, Y] pixels.
      size: radius of the disc of equal area, a scalar or [n].

    Returns:
      float32 [n, Y, X].
    """
    r = np.broadcast_to(np.asarray(size, np.float32), (len(dx),))[:, None]  # [n, 1]
    name = SHAPES[shape]
    if name == "square":
        half = np.float32(_HALF_SIDE) * r
        return np.maximum((np.abs(dy) - half)[:, :, None], (np.abs(dx) - half)[:, None, :])
    if name == "triangle":
        inradius = np.float32(_INRADIUS) * r
        sides = np.float32(np.sqrt(0.75)) * np.abs(dx)[:, None, :] - (dy / 2 + inradius)[:, :, None]
        return np.maximum(sides, (dy - inradius)[:, :, None])
    outer = (np.float32(_OUTER) * r)[..., None]  # [n, 1, 1]
    radius = np.sqrt((dx * dx)[:, None, :] + (dy * dy)[:, :, None])
    middle, half_width = outer * np.float32((1 + _HOLE) / 2), outer * np.float32((1 - _HOLE) / 2)
    return np.abs(radius - middle) - half_width


def coverage(shape: int, dx: np.ndarray, dy: np.ndarray, size: float | np.ndarray) -> np.ndarray:
    """Share of every pixel that the sprite covers, float32 [n, Y, X] in [0, 1]; arguments as above."""
    return covered(signed_distance(shape, dx, dy, size))


def covered(distance: np.ndarray) -> np.ndarray:
    """Coverage of the pixels at a signed distance from the edge, float32, in the place of its argument."""
    np.subtract(np.float32(0.5), distance, out=distance)
    return np.clip(distance, 0, 1, out=distance)
