"""From readings to scores: adherence, identity, drift and what happens at a prompt switch.

Scores are per clip and per window of video frames, so that a trend over a long video can be seen. A
frame without a sprite counts as wrong everywhere: it adheres to nothing, kept nothing of its identity,
and has no sharpness and no contrast.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longlive_jax.errors import require
from longlive_jax.toy.measure import MOTION_SPAN, Readings, motion_codes
from longlive_jax.toy.renderer import BACKGROUND_TABLE, COLOUR_TABLE, MOTION_TABLE, wrap
from longlive_jax.toy.world import BACKGROUND, COLOUR, MOTION, World, generator

IDENTITY = ("size", "shade", "gradient", "lane")
"""The unprompted attributes, in the order of the last axis of `identity`.

The lane is the place across the motion: the row of a sprite that moves left, and both coordinates of
one that stays still.
"""


_HELD = 0.75
"""Share of the frames in which an attribute that holds reads as asked for."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of B clips in W windows.

    Attributes:
      present: share of frames with a sprite, [B, W].
      adherence: share of frames whose shape, colour, motion, background are the target's, [B, W, 4].
      adherence_all: share of frames in which all four are, [B, W].
      iou: intersection over union with the best template, [B, W].
      identity: how much of size, shade, gradient and lane is as it was in the first window, [B, W, 4]:
        1 unchanged, 0 changed by the world's whole range (for the lane: by a quarter of the frame).
      sprite_drift: RGB distance of the sprite from what its target and its first window say, [B, W].
      background_drift: the same for the background's constant part, [B, W].
      sharpness: slope of the sprite's edge relative to the first window, [B, W].
      contrast: contrast of sprite and background, relative to that of the target's colours and to the
        first window, [B, W].
      flicker: mean absolute change between frames that motion does not explain, [B, W].
      residual: root mean square of what the readings do not explain, [B, W].
    """

    present: np.ndarray
    adherence: np.ndarray
    adherence_all: np.ndarray
    iou: np.ndarray
    identity: np.ndarray
    sprite_drift: np.ndarray
    background_drift: np.ndarray
    sharpness: np.ndarray
    contrast: np.ndarray
    flicker: np.ndarray
    residual: np.ndarray


def score(world: World, readings: Readings, targets: np.ndarray, *, window_frames: int = 48) -> Scores:
    """Compares readings with what the captions asked for, window by window.

    Args:
      world: geometry.
      readings: of B clips with V frames.
      targets: codes, int [B, 4] or, where they change with time, [B, V, 4].
      window_frames: video frames per window, at least `MOTION_SPAN`; frames left over after the last
        whole window join it. 48 are the 12 latent frames of the model's window.

    Raises:
      UserError: targets of another shape, or windows that are too short or longer than the video.
    """
    frames = readings.present.shape[1]
    require(
        MOTION_SPAN <= window_frames <= frames,
        f"window_frames={window_frames} must be between {MOTION_SPAN} and the video's {frames} frames",
    )
    edges = [*(window_frames * i for i in range(frames // window_frames)), frames]
    return score_spans(world, readings, targets, spans=tuple(itertools.pairwise(edges)))


def score_spans(
    world: World, readings: Readings, targets: np.ndarray, *, spans: Sequence[tuple[int, int]]
) -> Scores:
    """As `score`, with windows of any place and length.

    Args:
      world: geometry.
      readings: of B clips with V frames.
      targets: codes, int [B, 4] or, where they change with time, [B, V, 4].
      spans: (first, end) video frames of every window, `end` not included. The first window begins with
        the video: it is what identity and drift compare with.

    Raises:
      UserError: targets of another shape, or spans that are empty or not in the video.
    """
    batch, frames = readings.present.shape
    targets = _per_frame(targets, batch, frames)
    require(
        len(spans) > 0 and spans[0][0] == 0 and all(0 <= a < b <= frames for a, b in spans),
        f"spans={spans} must begin with the video and lie in its {frames} frames",
    )

    def windows(values: np.ndarray) -> np.ndarray:
        """Means over windows: [B, V, ...] -> [B, W, ...]."""
        return np.stack([np.mean(values[:, a:b], axis=1, dtype=np.float64) for a, b in spans], axis=1)

    right = matches(world, readings, targets)
    drift = _Drift(world, readings, targets, spans[0][1])
    sharpness, contrast = windows(readings.sharpness), windows(drift.relative_contrast())
    flicker = np.concatenate([readings.flicker, readings.flicker[:, -1:]], axis=1)  # one value per frame
    return Scores(
        present=windows(readings.present),
        adherence=windows(right),
        adherence_all=windows(np.all(right, axis=-1)),
        iou=windows(readings.iou),
        identity=windows(drift.identity()),
        sprite_drift=windows(drift.sprite()),
        background_drift=windows(drift.background()),
        sharpness=sharpness / np.maximum(sharpness[:, :1], 1e-6),
        contrast=contrast / np.maximum(contrast[:, :1], 1e-6),
        flicker=windows(flicker),
        residual=windows(readings.residual),
    )


def matches(world: World, readings: Readings, targets: np.ndarray) -> np.ndarray:
    """Whether every frame's attributes are the targets', bool [B, V, 4].

    Motion is read anew so that no reading looks across a change of its target.

    Args:
      world: geometry.
      readings: of B clips with V frames.
      targets: codes, int [B, V, 4].
    """
    codes = readings.codes.copy()
    for clip, target in enumerate(targets):
        cuts = 1 + np.flatnonzero(np.diff(target[:, MOTION]))
        if len(cuts):
            row = slice(clip, clip + 1)
            codes[row, :, MOTION] = motion_codes(
                world, readings.centre[row], readings.present[row], cuts=cuts.tolist()
            )
    return codes == targets


def _per_frame(targets: np.ndarray, batch: int, frames: int) -> np.ndarray:
    targets = np.asarray(targets)
    if targets.shape == (batch, 4):
        targets = np.repeat(targets[:, None], frames, axis=1)
    require(
        targets.shape == (batch, frames, 4),
        f"targets has shape {targets.shape}; it must be [{batch}, 4] or [{batch}, {frames}, 4]",
    )
    return targets


class _Drift:
    """Departure of every frame from the clip's own first window."""

    def __init__(self, world: World, readings: Readings, targets: np.ndarray, first_frames: int) -> None:
        self._world, self._readings, self._targets = world, readings, targets
        seen = readings.present[:, :first_frames]
        self._ever = seen.any(1, keepdims=True)  # [B, 1]
        self._first = np.where(self._ever, seen, True)  # frames the references are taken from
        self._first_frames = first_frames
        self._shade = self._reference(readings.shade)  # [B, 1]

    def _reference(self, values: np.ndarray) -> np.ndarray:
        """Median over the first window's frames that show a sprite, [B, V, ...] -> [B, 1, ...]."""
        head = np.asarray(values[:, : self._first_frames], np.float64)
        chosen = self._first.reshape(*self._first.shape, *(1,) * (values.ndim - 2))
        return np.nanmedian(np.where(chosen, head, np.nan), axis=1, keepdims=True)

    def _lost(self, error: np.ndarray) -> np.ndarray:
        """Clips errors [B, V] at 1, which is also what a frame without a sprite gets."""
        valid = self._readings.present & self._ever
        return np.where(valid, np.minimum(error, 1), 1.0)

    def identity(self) -> np.ndarray:
        """1 minus the relative change of size, shade, gradient and lane, [B, V, 4]."""
        world, readings = self._world, self._readings
        size = np.abs(readings.size - self._reference(readings.size)) / np.ptp(world.size_range)
        shade = np.abs(readings.shade - self._shade) / np.ptp(world.shade_range)
        turn = np.linalg.norm(readings.gradient - self._reference(readings.gradient), axis=-1)
        gradient = np.minimum(turn / (2 * world.gradient_range[1]), 1)  # does not need a sprite
        lane = self._lane() / (min(world.width, world.height) / 4)
        return 1 - np.stack([self._lost(size), self._lost(shade), gradient, self._lost(lane)], axis=-1)

    def _lane(self) -> np.ndarray:
        """Distance from the lane in which the current motion began, [B, V] pixels."""
        period = np.array([self._world.width, self._world.height])
        distance = np.zeros(self._readings.present.shape)
        for clip, target in enumerate(self._targets):
            cuts = [0, *(1 + np.flatnonzero(np.diff(target[:, MOTION]))).tolist(), len(target)]
            for begin, end in itertools.pairwise(cuts):
                centre = self._readings.centre[clip, begin:end]
                # The mean of the first frames around the first one: circular, and steady under noise.
                early = centre[0] + wrap(centre[:MOTION_SPAN] - centre[0], period).mean(0)
                across = MOTION_TABLE[target[begin, MOTION]] == 0
                away = wrap(centre - early, period) * across
                distance[clip, begin:end] = np.linalg.norm(away, axis=-1)
        return distance

    def sprite(self) -> np.ndarray:
        """Distance of the sprite's colour from its target's at the clip's own shade, [B, V]."""
        expected = self._shade[..., None] * COLOUR_TABLE[self._targets[..., COLOUR]]
        return self._lost(self._departure(self._readings.sprite_rgb - expected))

    def background(self) -> np.ndarray:
        """Distance of the background from its target, [B, V]."""
        return self._departure(
            self._readings.background_rgb - BACKGROUND_TABLE[self._targets[..., BACKGROUND]]
        )

    def _departure(self, error: np.ndarray) -> np.ndarray:
        return np.linalg.norm(error - self._reference(error), axis=-1)

    def relative_contrast(self) -> np.ndarray:
        """Contrast over that of the target's colours, [B, V]."""
        sprite = self._shade[..., None] * COLOUR_TABLE[self._targets[..., COLOUR]]
        asked = np.linalg.norm(sprite - BACKGROUND_TABLE[self._targets[..., BACKGROUND]], axis=-1)
        return self._readings.contrast / np.maximum(asked, 1e-6)


# --- prompt switches ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SwitchScores:
    """What a prompt switch did to B clips, in W windows after it.

    Attributes:
      new: share of the changed attributes that read as the new prompt says, [B, W].
      old: share of the changed attributes that still read as the old prompt said, [B, W].
      unchanged: share of the attributes both prompts agree on that read so, [B, W]; not a number where
        all four changed.
      held: whether, from the third block after the switch to the last window, every changed attribute
        reads as new in at least three frames of four, bool [B].
      held_each: the same by attribute, [B, 4]; not a number where it does not change.
      stays: whether every attribute both prompts agree on reads so in at least three of four frames after
        the switch, [B]; not a number where all four changed.
      identity: size, shade and gradient of each window against the last frames before the switch, as
        `Scores.identity`, [B, W, 3].
      place: pixels by which the sprite's place jumps beyond its own step at the switch, [B]; a quarter
        of the frame where the sprite is missing on either side.
      jump: largest change between frames at the switch over the clip's median change, [B].
    """

    new: np.ndarray
    old: np.ndarray
    unchanged: np.ndarray
    held: np.ndarray
    held_each: np.ndarray
    stays: np.ndarray
    identity: np.ndarray
    place: np.ndarray
    jump: np.ndarray


def score_switch(
    world: World,
    readings: Readings,
    *,
    old: np.ndarray,
    new: np.ndarray,
    frame: int,
    window_frames: int = 12,
    windows: int = 3,
    grace_frames: int = 24,
) -> SwitchScores:
    """Judges one switch per clip, at the same frame in all of them.

    Args:
      world: geometry.
      readings: of B clips; the whole video, before and after the switch.
      old: codes before, int [B, 4].
      new: codes after, int [B, 4]; differs from `old` in every clip.
      frame: first video frame of the new prompt.
      window_frames: video frames per window after the switch; 12 are one block of three latents.
      windows: how many windows.
      grace_frames: frames after the switch that `held` does not look at; 24 are two blocks.

    Raises:
      UserError: nothing changes, or the video does not reach far enough before or after the switch.
    """
    frames = readings.present.shape[1]
    stop = frame + window_frames * windows
    require(bool((old != new).any(1).all()), "old and new attributes must differ in every clip")
    require(
        frame >= MOTION_SPAN and stop <= frames and frame + grace_frames < stop,
        f"frame={frame} needs {MOTION_SPAN} frames before it and {stop - frame} after it in a video of "
        f"{frames}, and windows that reach beyond grace_frames={grace_frames}",
    )
    before = np.broadcast_to(np.arange(frames)[None, :, None] < frame, (len(old), frames, 4))
    hit_new = matches(world, readings, np.where(before, old[:, None], new[:, None]))[:, frame:stop]
    codes = readings.codes[:, frame:stop].copy()
    codes[..., MOTION] = motion_codes(world, readings.centre, readings.present, cuts=[frame])[:, frame:stop]
    changed = (old != new)[:, None]  # [B, 1, 4]

    def share(hits: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Share of the attributes `among` that hit, per window: [B, frames, 4] -> [B, W]."""
        count = np.where(among.any(-1), among.sum(-1), np.nan)
        per_frame = (hits & among).sum(-1) / count
        return per_frame.reshape(len(old), windows, window_frames).mean(-1)

    is_held = hit_new[:, grace_frames:].mean(1) >= _HELD  # [B, 4]
    return SwitchScores(
        new=share(hit_new, changed),
        old=share(codes == old[:, None], changed),
        unchanged=share(hit_new, ~changed),
        held=(is_held | ~changed[:, 0]).all(1),
        held_each=np.where(changed[:, 0], is_held, np.nan),
        stays=np.where(changed.all((1, 2)), np.nan, ((hit_new.mean(1) >= _HELD) | changed[:, 0]).all(1)),
        identity=_identity_after(world, readings, frame, window_frames, windows),
        place=_place_jump(world, readings, old, frame),
        jump=_boundary_jump(readings, frame),
    )


def _identity_after(
    world: World, readings: Readings, frame: int, window_frames: int, windows: int
) -> np.ndarray:
    """Size, shade and gradient after the switch against the frames just before it, [B, W, 3]."""
    start, stop = max(frame - window_frames, 0), frame + window_frames * windows
    seen = readings.present[:, start:stop]

    def error(values: np.ndarray, scale: float) -> np.ndarray:
        reference = np.median(values[:, start:frame], axis=1, keepdims=True)
        return np.minimum(np.linalg.norm(values[:, start:stop] - reference, axis=-1) / scale, 1)

    had = seen[:, : frame - start].any(1, keepdims=True)
    size = np.where(seen & had, error(readings.size[..., None], np.ptp(world.size_range)), 1.0)
    shade = np.where(seen & had, error(readings.shade[..., None], np.ptp(world.shade_range)), 1.0)
    gradient = error(readings.gradient, 2 * world.gradient_range[1])
    errors = np.stack([size, shade, gradient], axis=-1)[:, frame - start :]
    return 1 - errors.reshape(len(seen), windows, window_frames, 3).mean(2)


def _place_jump(world: World, readings: Readings, old: np.ndarray, frame: int) -> np.ndarray:
    period = np.array([world.width, world.height])
    step = wrap(readings.centre[:, frame] - readings.centre[:, frame - 1], period)
    beyond = np.linalg.norm(step - world.speed * MOTION_TABLE[old[:, MOTION]], axis=-1)
    both = readings.present[:, frame] & readings.present[:, frame - 1]
    return np.where(both, beyond, min(world.width, world.height) / 4)


def _boundary_jump(readings: Readings, frame: int, reach: int = 1) -> np.ndarray:
    """Largest change within `reach` frames of the switch over the median of the clip, [B]."""
    at = readings.change[:, max(frame - 1 - reach, 0) : frame + reach].max(1)
    return at / np.maximum(np.median(readings.change, axis=1), 1e-6)


# --- summaries ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over clips with the bootstrap interval of that mean; arrays over a score's other axes."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def summarise(
    scores: Any, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Mapping[str, Interval]:
    """Means over clips with bootstrap confidence intervals.

    Args:
      scores: a `Scores` or `SwitchScores` (any dataclass of arrays that begin with the clips' axis).
        Clips in which a score is not a number are left out of it.
      level: share of the resampled means inside the interval, in (0, 1).
      resamples: bootstrap samples.
      seed: of the resampling.

    Returns:
      One interval per field, its arrays shaped like the field without the first axis.
    """
    return {
        field.name: bootstrap(getattr(scores, field.name), level=level, resamples=resamples, seed=seed)
        for field in dataclasses.fields(scores)
    }


def bootstrap(values: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over clips with its bootstrap confidence interval.

    Args:
      values: [B, ...]; entries that are not a number are left out.
      level: share of the resampled means inside the interval, in (0, 1).
      resamples: bootstrap samples.
      seed: of the resampling; arrays of equally many clips are resampled alike.

    Returns:
      The interval, its arrays shaped like `values` without the first axis.
    """
    require(0 < level < 1, f"level={level} must be in (0, 1)")
    require(resamples > 0, f"resamples={resamples} must be positive")
    tails: Sequence[float] = ((1 - level) / 2, (1 + level) / 2)
    values = np.asarray(values, np.float64)
    clips, shape = len(values), values.shape[1:]
    flat = values.reshape(clips, -1)
    # How often each clip is drawn; the same draws for every score, so that they can be compared.
    weights = generator(seed).multinomial(clips, np.full(clips, 1 / clips), size=resamples)
    valid = ~np.isnan(flat)
    filled = np.where(valid, flat, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / valid.sum(0)
        drawn = weights @ valid
        means = np.where(drawn > 0, (weights @ filled) / drawn, mean)
    low, high = np.quantile(means, tails, axis=0)
    return Interval(mean.reshape(shape), low.reshape(shape), high.reshape(shape))
