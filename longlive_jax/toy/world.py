"""The toy world: what a clip can contain, which combinations are held out, and how scenes are drawn.

A scene is one sprite on a torus (what leaves at one edge comes back at the other). Four *prompted*
attributes are named by the caption; size, shade, background gradient and place are *unprompted* but
persist through the clip, so that a model's memory shows: the caption cannot repair them.

Numbers that were chosen, and why:

- 64 x 64 pixels are 8 x 8 latent cells and 4 x 4 tokens under the VAE's stride 8 and the patch 2 x 2.
- Speed 2 pixels per video frame is one latent cell per latent frame (stride 4 in time): a direction
  can be read within one latent, a block of three latents moves the sprite by 24 pixels, and a lap
  takes 32 video frames, 2 s at 16 fps.
- Square, triangle and ring have easy names, equal areas, and differ in what a coarse latent keeps: after
  a blur of 2 pixels their relative L2 distances are 0.34 to 0.71, where a disc and a square are 0.14 apart.
- A size is the radius of the disc of equal area, so that it means the same for every shape. Sizes of 9
  to 12 give squares of 16 to 21 pixels, a quarter to a third of the frame's side.
- A lane keeps 16 pixels from the edges, so a sprite is cut in two only where it moves over one. Without,
  nearly half of all frames would show it in pieces: 1 - (1 - 17 / 64)^2 at a width of 17 pixels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from longlive_jax.errors import UserError, require

Split = Literal["train", "held_out", "all"]

SHAPES = ("square", "triangle", "ring")

COLOURS = {
    "red": (0.90, 0.22, 0.21),
    "yellow": (0.98, 0.80, 0.15),
    "green": (0.22, 0.70, 0.30),
    "blue": (0.16, 0.45, 0.93),
}
"""Sprite colours at shade 1, RGB in [0, 1]."""

MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Directions (x, y) on the screen, y pointing down."""

BACKGROUNDS = {"dark": (0.14, 0.15, 0.20), "gray": (0.50, 0.50, 0.50), "light": (0.86, 0.84, 0.78)}
"""Background colours at the centre of the frame, RGB in [0, 1]."""

FIELDS = ("shape", "colour", "motion", "background")
"""The prompted attributes, in the order of every `codes` array's last axis."""

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
}
"""The values of every prompted attribute; a code is an index into them."""

SHAPE, COLOUR, MOTION, BACKGROUND = range(4)

TEMPLATE_COUNT = 4
"""Ways to phrase a caption (the sentences are in `grammar`)."""


@dataclasses.dataclass(frozen=True)
class World:
    """Geometry and ranges of the toy world.

    Attributes:
      height: pixel rows.
      width: pixel columns.
      fps: video frames per second.
      speed: pixels a moving sprite advances per video frame.
      size_range: smallest and largest size, the radius in pixels of the disc of equal area.
      shade_range: smallest and largest factor on the sprite's colour.
      gradient_range: smallest and largest change of the background's intensity from the centre of
        the frame to an edge, along the gradient.
      lane_margin: pixels the sprite's centre keeps from the edges it does not move towards. At 0 its lane
        may straddle an edge for the whole clip, which is also what a switch of the motion can lead to.
    """

    height: int = 64
    width: int = 64
    fps: int = 16
    speed: float = 2.0
    size_range: tuple[float, float] = (9.0, 12.0)
    shade_range: tuple[float, float] = (0.75, 1.0)
    gradient_range: tuple[float, float] = (0.03, 0.10)
    lane_margin: float = 16.0

    def __post_init__(self) -> None:
        for name in ("size_range", "shade_range", "gradient_range"):
            low, high = getattr(self, name)
            require(0 < low < high, f"world.{name}={(low, high)} must rise and be positive")
        side = min(self.height, self.width)
        require(
            self.size_range[1] * 4 <= side,
            f"world.size_range={self.size_range} is too large for {self.height}x{self.width}: "
            f"the largest size must be at most {side / 4:g}",
        )
        require(
            0 < self.speed <= side / 16,
            f"world.speed={self.speed} must be in (0, {side / 16:g}]: more cannot be read unambiguously",
        )
        require(
            0 <= self.lane_margin <= side / 4,
            f"world.lane_margin={self.lane_margin} must be in [0, {side / 4:g}]",
        )
        require(self.fps > 0, f"world.fps={self.fps} must be positive")


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What a caption says, by name. Values that do not exist are refused."""

    shape: str
    colour: str
    motion: str
    background: str

    def __post_init__(self) -> None:
        for field in FIELDS:
            value = getattr(self, field)
            require(
                value in VALUES[field],
                f"{field}={value!r} must be one of {', '.join(map(repr, VALUES[field]))}",
            )

    @property
    def codes(self) -> tuple[int, ...]:
        """Index of every value, in the order of `FIELDS`."""
        return tuple(VALUES[field].index(getattr(self, field)) for field in FIELDS)

    @classmethod
    def from_codes(cls, codes: Sequence[int] | np.ndarray) -> "Attributes":
        """The attributes of one row of codes [4]."""
        return cls(**{field: VALUES[field][int(code)] for field, code in zip(FIELDS, codes, strict=True)})


def is_held_out(codes: Sequence[int]) -> bool:
    """Whether training never shows this combination.

    For every colour and motion exactly one pair of shape and background is held out: 20 of the 180
    combinations. Every value, and every pair of values, of two attributes is still trained on.
    """
    shape, colour, motion, background = codes
    return (shape + colour + motion) % 3 == 0 and (background + colour + 2 * motion) % 3 == 0


@functools.cache
def combinations(split: Split) -> np.ndarray:
    """All codes of a split in a fixed order, int32 [N, 4] (read-only)."""
    if split not in ("train", "held_out", "all"):
        raise UserError(f"split={split!r} must be one of 'train', 'held_out', 'all'")
    every = itertools.product(*(range(len(VALUES[field])) for field in FIELDS))
    chosen = [codes for codes in every if split == "all" or is_held_out(codes) == (split == "held_out")]
    array = np.array(chosen, np.int32)
    array.setflags(write=False)
    return array


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A batch of scenes: everything that decides the pixels, as arrays.

    Attributes:
      codes: prompted attributes, int32 [B, 4].
      template: phrasing of the caption, int32 [B].
      size: radius of the disc of equal area in pixels, float64 [B].
      shade: factor on the sprite's colour, float64 [B].
      gradient: change of intensity from the centre to the right and to the bottom edge, float64 [B, 2].
      start: centre (x, y) of the sprite in frame 0, pixels, float64 [B, 2].
    """

    codes: np.ndarray
    template: np.ndarray
    size: np.ndarray
    shade: np.ndarray
    gradient: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | np.ndarray) -> "Scenes":
        """The scenes of some rows (a slice or an index array)."""
        return Scenes(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random stream of (seed, key): the same numbers on every machine and in any order of use."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def sample_scenes(
    world: World, *, seed: int, indices: Sequence[int] | np.ndarray, split: Split = "train"
) -> Scenes:
    """Draws scenes; row i depends on `seed`, `indices[i]` and `split` only.

    Args:
      world: ranges to draw from.
      seed: non-negative integer that names the data set.
      indices: non-negative integers [B], one per clip.
      split: which combinations of prompted attributes to draw from.

    Raises:
      UserError: the seed is negative or the split is unknown.
    """
    require(seed >= 0, f"seed={seed} must be 0 or more")
    allowed = combinations(split)
    choice, unit = [], []
    for index in indices:
        stream = generator(seed, int(index))
        choice.append((stream.integers(len(allowed)), stream.integers(TEMPLATE_COUNT)))
        unit.append(stream.random(6))
    picked = np.array(choice, np.int64).reshape(-1, 2)
    u = np.array(unit, np.float64).reshape(-1, 6)
    codes = allowed[picked[:, 0]]
    angle, strength = 2 * np.pi * u[:, 2], _between(u[:, 3], world.gradient_range)
    return Scenes(
        codes=codes,
        template=picked[:, 1].astype(np.int32),
        size=_between(u[:, 0], world.size_range),
        shade=_between(u[:, 1], world.shade_range),
        gradient=strength[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1),
        start=_starts(world, codes, u[:, 4:6]),
    )


def _starts(world: World, codes: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Centres in frame 0, [B, 2]: anywhere along the motion, inside the margin across it."""
    side = np.array([world.width, world.height])
    moves = np.array(list(MOTIONS.values()))[codes[:, MOTION]] != 0  # [B, 2]
    margin = np.where(moves, 0.0, world.lane_margin)
    return margin + unit * (side - 2 * margin)


def _between(unit: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return bounds[0] + unit * (bounds[1] - bounds[0])


@functools.cache
def _neighbours(split: Split) -> np.ndarray:
    """In how many attributes each pair of a split's combinations differs, int [N, N]."""
    codes = combinations(split)
    return (codes[:, None] != codes[None]).sum(-1)


def sample_switch(codes: np.ndarray, *, stream: np.random.Generator, split: Split = "train") -> np.ndarray:
    """Draws the attributes to switch to, which differ in 1 to 4 places (each number equally often).

    Args:
      codes: the attributes before the switch, int [4]; must belong to `split`.
      stream: source of randomness.
      split: which combinations to draw from.

    Returns:
      Codes [4] of the same split, int32.

    Raises:
      UserError: `codes` is not in `split`.
    """
    allowed = combinations(split)
    row = np.flatnonzero((allowed == codes).all(-1))
    require(len(row) == 1, f"attributes {tuple(map(int, codes))} are not in the split {split!r}")
    distance = _neighbours(split)[row[0]]
    count = stream.choice(np.unique(distance[distance > 0]))
    return allowed[stream.choice(np.flatnonzero(distance == count))]
