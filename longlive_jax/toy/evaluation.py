"""What is measured of a model of the toy world: numbers per clip, their intervals, paired differences.

Everything here is a pure function of pixels and of what was asked for; `benchmarks/toy_model.py` makes the
videos. Lengths are given in latent frames and counted in the video frames that a causal VAE makes of
them: one of the first latent frame, `temporal_stride` of every later one.

A *table* maps a measure to an array that begins with the clips' axis; not a number where the measure does
not apply to a clip. Shares and similarities are in [0, 1], high is good; drift, flicker and jumps are
better low.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from longlive_jax.config import VAEConfig
from longlive_jax.errors import require
from longlive_jax.toy.measure import Readings, read
from longlive_jax.toy.scores import IDENTITY, Scores, bootstrap, matches, score_spans, score_switch
from longlive_jax.toy.world import (
    BACKGROUND,
    FIELDS,
    SHAPE,
    SHAPES,
    TEMPLATE_COUNT,
    World,
    combinations,
    generator,
    is_held_out,
)

Table = Mapping[str, np.ndarray]
"""Measure to values, `[B]` or `[B, W]` with W windows or blocks."""

CHANGES = (1, 2, 4)
"""Attributes a switch changes, in turn: one, two, all."""

GRACE_BLOCKS = 2
"""Blocks after a switch within which the new attributes must have come."""

MIN_PAIRS = 8
"""Fewest pairs from which a difference is concluded: the interval of fewer is too narrow."""

_SWITCH_STREAM = 2  # keeps a clip's switch independent of its scene, as in `toy.data`
_Z = 1.959964  # normal quantile of a two-sided 95%


# --- what is asked for ------------------------------------------------------------------------------


def sample_switches(
    codes: np.ndarray, *, changes: Sequence[int], seed: int, indices: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws what to switch to: which attributes change is uniform, their new values as training never saw.

    A held-out combination is taken wherever one differs in just those attributes. Often none does (in shape
    alone, say); then any combination is.

    Args:
      codes: attributes before, int [B, 4].
      changes: how many attributes change, 1 to 4, for each clip.
      seed: names the draw.
      indices: of the clips, [B]; row i depends on `seed`, `indices[i]` and row i of the others only.

    Returns:
      Attributes after, int32 [B, 4], and the phrasing of their caption, int [B].
    """
    every = combinations("all")
    held_out = np.array([is_held_out(row) for row in every])
    after, templates = [], []
    for row, count, index in zip(codes, changes, indices, strict=True):
        stream = generator(seed, int(index), _SWITCH_STREAM)
        mask = np.isin(np.arange(len(FIELDS)), stream.choice(len(FIELDS), count, replace=False))
        fits = ((every != row) == mask).all(-1)
        among = np.flatnonzero(fits & held_out if (fits & held_out).any() else fits)
        after.append(every[stream.choice(among)])
        templates.append(stream.integers(TEMPLATE_COUNT))
    return np.array(after, np.int32), np.array(templates)


def video_span(vae: VAEConfig, first: int, end: int) -> tuple[int, int]:
    """Video frames [begin, stop) of the latent frames [first, end)."""
    return vae.video_frames(first), vae.video_frames(end)


def latent_windows(frames: int, window_frames: int) -> list[tuple[int, int]]:
    """Whole windows of latent frames; what is left over joins the last one."""
    starts = range(0, max(frames - window_frames, 0) + 1, window_frames)
    return list(itertools.pairwise([*starts, frames]))


# --- numbers per clip -------------------------------------------------------------------------------


def read_pixels(world: World, videos: np.ndarray) -> Readings:
    """Reads videos as a pipeline returns them, one at a time (float copies are four times as large).

    Args:
      world: geometry.
      videos: uint8 `[B, V, Y, X, 3]`.
    """
    clips = [read(world, video.astype(np.float32) / 127.5 - 1) for video in videos]
    return join_readings(clips)


def join_readings(parts: Sequence[Readings]) -> Readings:
    """The readings of several batches as one."""
    fields = dataclasses.fields(Readings)
    return Readings(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields})


def measure_clips(
    world: World,
    readings: Readings,
    codes: np.ndarray,
    *,
    vae: VAEConfig,
    frames: int,
    window_frames: int = 12,
    end_frames: int = 21,
) -> dict[str, np.ndarray]:
    """Adherence, identity, flicker and drift of clips whose prompt does not change.

    Args:
      world: geometry.
      readings: of B clips.
      codes: what was asked for, int [B, 4].
      vae: gives the video frames of a latent frame.
      frames: latent frames of the clips.
      window_frames: latent frames per window, over which drift is followed.
      end_frames: latent frames at either end that are compared (the length of the training clips).

    Returns:
      `shape`, `colour`, `motion`, `background`, `all`: share of frames that show what was asked for, over
      the whole clip; with `first.` and `last.` in front, at its ends; `fall.`: first minus last.
      `shape.square` etc.: `shape` of the clips that should show one.
      `present`: share of frames with a sprite. `vanished`: 1 where a window after the first has a sprite in
      less than half of its frames. `iou`, `flicker`, `residual`: see `scores.Scores`. `identity.size` etc.:
      how much of it is as in the first window, over the windows after it (over itself where it is alone).
      `drift.sprite`, `drift.background`: distance of the colour in the last window from the first.
      `windows.*`: by window.
    """
    whole = score_spans(world, readings, codes, spans=[video_span(vae, 0, frames)])
    ends = score_spans(
        world,
        readings,
        codes,
        spans=[video_span(vae, 0, end_frames), video_span(vae, frames - end_frames, frames)],
    )
    spans = [video_span(vae, *window) for window in latent_windows(frames, window_frames)]
    windows = score_spans(world, readings, codes, spans=spans)
    first, last = _adherence(ends, 0), _adherence(ends, 1)
    table: dict[str, np.ndarray] = _adherence(whole, 0)
    for code, name in enumerate(SHAPES):  # one of them may be lost where the others are right
        table[f"shape.{name}"] = np.where(codes[:, SHAPE] == code, table["shape"], np.nan)
    table |= {f"first.{name}": values for name, values in first.items()}
    table |= {f"last.{name}": values for name, values in last.items()}
    table |= {f"fall.{name}": first[name] - last[name] for name in first}
    table |= {name: getattr(whole, name)[:, 0] for name in ("present", "iou", "flicker", "residual")}
    table["vanished"] = np.asarray((windows.present[:, 1:] < 0.5).any(1), np.float64)
    later = windows.identity[:, 1:] if len(spans) > 1 else windows.identity  # [B, W - 1, 4]
    for i, name in enumerate(IDENTITY):
        table[f"identity.{name}"] = later[..., i].mean(1)
        table[f"windows.identity.{name}"] = windows.identity[..., i]
    table |= {
        "drift.sprite": windows.sprite_drift[:, -1],
        "drift.background": windows.background_drift[:, -1],
    }
    table |= {f"windows.{name}": windows.adherence[..., i] for i, name in enumerate(FIELDS)}
    return table | {
        "windows.all": windows.adherence_all,
        "windows.present": windows.present,
        "windows.drift.sprite": windows.sprite_drift,
        "windows.drift.background": windows.background_drift,
        "windows.flicker": windows.flicker,
    }


def _adherence(scores: Scores, window: int) -> dict[str, np.ndarray]:
    table = {name: scores.adherence[:, window, i] for i, name in enumerate(FIELDS)}
    return table | {"all": scores.adherence_all[:, window]}


def measure_switches(
    world: World,
    readings: Readings,
    *,
    old: np.ndarray,
    new: np.ndarray,
    vae: VAEConfig,
    frames: int,
    switch_frame: int,
    block_frames: int = 3,
) -> dict[str, np.ndarray]:
    """What one prompt switch per clip did, block by block after it.

    Args:
      world: geometry.
      readings: of B clips, from their beginning.
      old: attributes before, int [B, 4].
      new: attributes after, int [B, 4]; differs from `old` in every clip.
      vae: gives the video frames of a latent frame.
      frames: latent frames of the clips.
      switch_frame: latent frame at which the new prompt takes effect, a block's first.
      block_frames: latent frames per block.

    Returns:
      `before`: share of frames of the last block before the switch that show the old prompt. `held`: 1
      where, from the third block on, every changed attribute reads as new in three frames of four;
      `held.1`, `held.2`, `held.4`: the same by the number of changed attributes. `held.shape` etc.: the
      same of that attribute alone; `held.shape.ring` etc.: where the new prompt asks for one. `stays`: 1
      where what the new prompt leaves unchanged reads right in three frames of four after the switch.
      `obeyed`: both.
      `jump`: largest change between frames at the boundary over the clip's median change, where the
      background is not asked to change (a new background is a jump in any case); `jump.any`: in all clips.
      `jump.place`: pixels by which the sprite's place jumps beyond its step. `jump.size`, `jump.shade`,
      `jump.gradient`: change of what no prompt names in the first block, as a share of the world's range.
      `blocks.new`, `blocks.old`, `blocks.unchanged`: share of these attributes by block after the switch.
    """
    frame, block = vae.video_frames(switch_frame), vae.temporal_stride * block_frames
    blocks = (frames - switch_frame) // block_frames
    require(
        blocks > GRACE_BLOCKS and switch_frame % block_frames == 0,
        f"switch_frame={switch_frame} must begin a block of {block_frames} and leave more than "
        f"{GRACE_BLOCKS} of them in {frames} latent frames",
    )
    scores = score_switch(
        world,
        readings,
        old=old,
        new=new,
        frame=frame,
        window_frames=block,
        windows=blocks,
        grace_frames=GRACE_BLOCKS * block,
    )
    is_before = (np.arange(readings.codes.shape[1]) < frame)[None, :, None]
    right = matches(world, readings, np.where(is_before, old[:, None], new[:, None]))
    held, count = scores.held.astype(np.float64), (old != new).sum(1)
    moved = 1 - scores.identity[:, 0]
    table = {
        "before": right[:, frame - block : frame].all(-1).mean(1),
        "held": held,
        **{f"held.{n}": np.where(count == n, held, np.nan) for n in CHANGES},
        **{f"held.{name}": scores.held_each[:, i] for i, name in enumerate(FIELDS)},
        **{
            f"held.shape.{name}": np.where(new[:, SHAPE] == i, scores.held_each[:, SHAPE], np.nan)
            for i, name in enumerate(SHAPES)
        },
        "stays": scores.stays,
        "obeyed": held * np.where(np.isnan(scores.stays), 1, scores.stays),
        "jump": np.where(old[:, BACKGROUND] == new[:, BACKGROUND], scores.jump, np.nan),
        "jump.any": scores.jump,
        "jump.place": scores.place,
    }
    table |= {f"jump.{name}": moved[:, i] for i, name in enumerate(IDENTITY[: moved.shape[1]])}
    return table | {f"blocks.{name}": getattr(scores, name) for name in ("new", "old", "unchanged")}


# --- over clips -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over clips and its 95% interval; arrays where the measure has windows.

    Attributes:
      mean: over the clips to which the measure applies.
      low: lower end.
      high: upper end.
      clips: how many clips.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    clips: np.ndarray


def estimate(values: np.ndarray) -> Estimate:
    """The mean over clips with a 95% interval.

    Where every clip says yes or no, Wilson's interval: of 32 clips that all say yes a bootstrap makes 1.00
    to 1.00. Everywhere else the bootstrap.

    Args:
      values: `[B, ...]`.
    """
    values = np.asarray(values, np.float64)
    valid = ~np.isnan(values)
    clips = valid.sum(0)
    found = bootstrap(values)
    if not np.isin(values[valid], (0, 1)).all():
        return Estimate(found.mean, found.low, found.high, clips)
    n = np.maximum(clips, 1)
    centre = (found.mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * np.sqrt(found.mean * (1 - found.mean) / n + _Z**2 / (4 * n**2))
    return Estimate(found.mean, np.maximum(centre - half, 0), np.minimum(centre + half, 1), clips)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A measure under two conditions, over the clips that both have.

    Attributes:
      first: mean under the first condition.
      second: mean under the second.
      difference: first minus second.
      low: lower end of the difference's 95% interval.
      high: upper end.
      clips: how many pairs.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    clips: int

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0; of too few pairs nothing is said."""
        return self.clips >= MIN_PAIRS and (self.low > 0 or self.high < 0)


def compare(first: np.ndarray, second: np.ndarray) -> Difference:
    """The paired difference: clip i of both has the same prompt and the same noise.

    Args:
      first: `[B]`.
      second: `[B]`.

    Raises:
      UserError: the two have not equally many clips.
    """
    require(
        first.shape == second.shape and first.ndim == 1,
        f"pairs have shapes {first.shape} and {second.shape}; they must be of the same clips",
    )
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        nothing = float("nan")
        return Difference(nothing, nothing, nothing, nothing, nothing, clips=0)
    a, b = np.asarray(first[both], np.float64), np.asarray(second[both], np.float64)
    found = bootstrap(a - b)
    return Difference(
        first=float(a.mean()),
        second=float(b.mean()),
        difference=float(found.mean),
        low=float(found.low),
        high=float(found.high),
        clips=len(a),
    )
