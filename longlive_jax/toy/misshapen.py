"""Sprites that are none of the world's shapes: what a reader of shapes must not take for one.

They are what few-step generators draw where they have not made up their mind: a shape between two, a ring
with a gap, a hole in the wrong place, two sprites at once, solid or faint, and one drawn out along its way.
"""

from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.toy.renderer import MOTION_TABLE, Drawing, coverage, covered, signed_distance
from longlive_jax.toy.world import SHAPES

_RING = SHAPES.index("ring")
_SOLID = [code for code in range(len(SHAPES)) if code != _RING]
_RING_SHARE = 0.6  # of the doubles and the drawn out: rings come apart more easily than the others
_ALONG_SHARE = 0.7  # of the doubles, apart along their way; the others anywhere


def draw_misshapen(motion: int, *, stream: np.random.Generator) -> Drawing:
    """Draws a way to be misshapen.

    Args:
      motion: code of the sprite's motion, along which it may be double or drawn out.
      stream: source of randomness.
    """
    kinds = list(_KINDS)
    kind = kinds[stream.choice(len(kinds), p=list(_KINDS.values()))]
    return kind(stream, motion)


def _between(stream: np.random.Generator, motion: int) -> Drawing:
    """Halfway from one shape to another."""
    one, other = stream.choice(len(SHAPES), 2, replace=False)
    share = np.float32(stream.uniform(0.35, 0.65))

    def draw(dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
        first, second = (signed_distance(shape, dx, dy, size) for shape in (one, other))
        return covered(share * first + (1 - share) * second)

    return draw


def _gap(stream: np.random.Generator, motion: int) -> Drawing:
    """A ring that is open somewhere."""
    middle, half = stream.uniform(0, 2 * np.pi), stream.uniform(0.35, 1.2)  # radians

    def draw(dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
        x, y = dx[:, None, :], dy[:, :, None]
        angle = np.abs(np.mod(np.arctan2(y, x) - middle + np.pi, 2 * np.pi) - np.pi)
        cut = (half - angle) * np.maximum(np.hypot(x, y), 1)  # pixels along the circle, positive in the gap
        return covered(np.maximum(signed_distance(_RING, dx, dy, size), cut).astype(np.float32))

    return draw


def _hole(stream: np.random.Generator, motion: int) -> Drawing:
    """A square or triangle with a small hole out of its middle."""
    shape, angle, away = stream.choice(_SOLID), stream.uniform(0, 2 * np.pi), stream.uniform(0.25, 0.5)

    def draw(dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
        x = dx[:, None, :] - away * size * np.cos(angle)
        y = dy[:, :, None] - away * size * np.sin(angle)
        hole = 0.35 * size - np.hypot(x, y)
        return covered(np.maximum(signed_distance(shape, dx, dy, size), hole).astype(np.float32))

    return draw


def _double(stream: np.random.Generator, motion: int) -> Drawing:
    """Two sprites, near enough to overlap or just apart."""
    shape, (x, y) = _ring_or(stream, range(len(SHAPES))), _apart(stream, motion)
    scale = stream.uniform(0.75, 1.1)

    def draw(dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
        one = signed_distance(shape, dx - x, dy - y, scale * size)
        return covered(np.minimum(one, signed_distance(shape, dx + x, dy + y, scale * size)))

    return draw


def _faint_double(stream: np.random.Generator, motion: int) -> Drawing:
    """The mean of a sprite here and the same sprite there."""
    shape, (x, y) = _ring_or(stream, range(len(SHAPES))), _apart(stream, motion)
    share = np.float32(stream.uniform(0.3, 0.7))

    def draw(dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
        here, there = coverage(shape, dx - x, dy - y, size), coverage(shape, dx + x, dy + y, size)
        return share * here + (1 - share) * there

    return draw


def _drawn_out(stream: np.random.Generator, motion: int) -> Drawing:
    """Longer along its way than across it."""
    shape, ratio = _ring_or(stream, _SOLID), stream.uniform(1.3, 2.0)
    is_wide = MOTION_TABLE[motion][0] != 0 or (not MOTION_TABLE[motion].any() and stream.random() < 0.5)
    across = np.float32(np.sqrt(ratio) if is_wide else 1 / np.sqrt(ratio))

    def draw(dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
        return covered(min(across, 1 / across) * signed_distance(shape, dx / across, dy * across, size))

    return draw


_KINDS: dict[Callable[[np.random.Generator, int], Drawing], float] = {
    _between: 0.12,
    _gap: 0.18,
    _hole: 0.12,
    _double: 0.30,
    _faint_double: 0.15,
    _drawn_out: 0.13,
}
"""Ways to be misshapen and how often each is drawn: most are double, as is most of what goes wrong."""


def _ring_or(stream: np.random.Generator, others: Sequence[int]) -> int:
    return _RING if stream.random() < _RING_SHARE else int(stream.choice(others))


def _apart(stream: np.random.Generator, motion: int) -> np.ndarray:
    """Half of the way (x, y) in pixels from one of two sprites to the other."""
    along = np.abs(MOTION_TABLE[motion])
    if not along.any() or stream.random() >= _ALONG_SHARE:
        angle = stream.uniform(0, np.pi)
        along = np.array([np.cos(angle), np.sin(angle)])
    return np.float32(stream.uniform(3.5, 13)) * along.astype(np.float32)
