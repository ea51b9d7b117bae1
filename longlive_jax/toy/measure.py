"""Reads a toy video back from its pixels alone: attributes, place, appearance and quality per frame.

How one frame is read: a plane of intensity is fitted to the background while what stands out from it
is left out; what stands out gives the sprite's colour, and the projection on that colour its coverage;
a correlation with a disc (FFT, so the torus is free) finds the sprite even among fragments; centroid
and area around that place give the templates to compare, and the best intersection over union names
the shape. Motion is read from the centres of 9 frames.

Nothing is ever missing: a sprite that cannot be found has shape, colour and motion `UNKNOWN`, which no
target equals, and an intersection over union, sharpness and contrast of 0.
"""

import colorsys
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from longlive_jax.errors import require
from longlive_jax.toy.renderer import (
    BACKGROUND_TABLE,
    COLOUR_TABLE,
    MOTION_TABLE,
    coverage,
    offsets,
    unit_coordinates,
    wrap,
)
from longlive_jax.toy.world import BACKGROUND, COLOUR, MOTION, SHAPE, SHAPES, World

UNKNOWN = -1
"""Code of an attribute that could not be read."""

MOTION_SPAN = 9
"""Video frames from which a motion is read."""

# Distances in RGB, channels in [0, 1]. The smallest contrast of a sprite with its background is 0.38
# (green at shade 0.75 on gray), less a gradient of at most 0.14 in a corner.
_BACKGROUND_TOLERANCE = 0.25
_MIN_CONTRAST = 0.18
_MIN_IOU = 0.5  # below, no template is a likeness
_MAX_HUE_ERROR = 25 / 360  # the palette's closest hues, red and yellow, are 46 degrees apart
_MIN_SATURATION = 0.3
_MAX_TURN = np.cos(np.pi / 6)  # a direction is read within 30 degrees
_TEMPLATE_SCALES = (0.85, 1.0)
_CHUNK = 16  # frames read together: the working set stays in the cache

_PALETTE_HUES = np.array([colorsys.rgb_to_hsv(*map(float, rgb))[0] for rgb in COLOUR_TABLE])


@dataclasses.dataclass(frozen=True)
class Readings:
    """What the pixels say. Leading axes [B, V], for one clip as for many.

    Attributes:
      codes: shape, colour, motion, background; int32 [B, V, 4], `UNKNOWN` where nothing fits. The
        motion of a frame is read from the `MOTION_SPAN` frames around it.
      present: whether there is a sprite of plausible size, bool [B, V].
      centre: centroid (x, y) in pixels, [B, V, 2]; the frame's best guess where nothing is present.
      size: radius in pixels of the disc of equal area, [B, V].
      shade: factor on the palette's nearest colour, [B, V].
      gradient: change of the background from centre to right and bottom edge, [B, V, 2].
      sprite_rgb: colour of the sprite's interior, [B, V, 3] in [0, 1].
      background_rgb: colour of the background at the centre, [B, V, 3] in [0, 1].
      contrast: RGB distance between the two, [B, V].
      iou: intersection over union of the sprite with the best template of its place and area, [B, V];
        fragments elsewhere in the frame count against it.
      sharpness: mean slope of the sprite's edge in coverage per pixel, [B, V]; about 0.45 when clean.
      residual: root mean square of what the reading does not explain (noise, fragments), [B, V].
      change: mean absolute difference of frame v and v + 1, [B, V - 1], intensities in [0, 1].
      flicker: the same after taking away the difference that the sprite's motion explains, [B, V - 1].
    """

    codes: np.ndarray
    present: np.ndarray
    centre: np.ndarray
    size: np.ndarray
    shade: np.ndarray
    gradient: np.ndarray
    sprite_rgb: np.ndarray
    background_rgb: np.ndarray
    contrast: np.ndarray
    iou: np.ndarray
    sharpness: np.ndarray
    residual: np.ndarray
    change: np.ndarray
    flicker: np.ndarray


def read(world: World, video: np.ndarray) -> Readings:
    """Reads every frame of a video.

    Args:
      world: geometry.
      video: [V, Y, X, 3] or [B, V, Y, X, 3], float in [-1, 1]; values beyond are clipped.

    Returns:
      The readings; a single clip has B = 1.

    Raises:
      UserError: wrong rank, size, no frames, or values that are not finite.
    """
    if video.ndim == 4:
        video = video[None]
    require(
        video.ndim == 5 and video.shape[2:] == (world.height, world.width, 3) and video.shape[1] > 0,
        f"video has shape {video.shape}; it must be [batch, frames, {world.height}, {world.width}, 3]",
    )
    batch, frames = video.shape[:2]
    spans = [(at, min(at + _CHUNK + 1, frames)) for at in range(0, frames, _CHUNK)]
    clips = []
    for clip in video:
        parts = []
        for begin, end in spans:
            # One frame more than the chunk, for the differences; its own reading is dropped.
            keep = min(_CHUNK, frames - begin)
            parts.append(_read_chunk(world, clip[begin:end], keep))
        clips.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
    values = {name: np.stack([c[name] for c in clips]) for name in clips[0]}
    codes = np.zeros((batch, frames, 4), np.int32)
    codes[..., SHAPE] = values.pop("shape")
    codes[..., COLOUR] = values.pop("colour")
    codes[..., BACKGROUND] = values.pop("backdrop")
    codes[..., MOTION] = motion_codes(world, values["centre"], values["present"])
    return Readings(codes=codes, **values)


def motion_codes(
    world: World, centre: np.ndarray, present: np.ndarray, *, cuts: Sequence[int] = ()
) -> np.ndarray:
    """Reads the motion around every frame from the way its sprite has gone.

    Args:
      world: geometry.
      centre: [B, V, 2] pixels.
      present: [B, V].
      cuts: frames at which the motion may change: no reading looks across one of them.

    Returns:
      int32 [B, V]. `UNKNOWN` where the sprite is missing in more than one frame of the span, where the
      speed is not near the world's or zero, or where the direction is oblique.
    """
    batch, frames = present.shape
    codes = np.full((batch, frames), UNKNOWN, np.int32)
    steps = wrap(np.diff(centre, axis=1), np.array([world.width, world.height]))  # [B, V - 1, 2]
    path = np.concatenate([np.zeros((batch, 1, 2)), np.cumsum(steps, axis=1)], axis=1)
    seen = np.concatenate([np.zeros((batch, 1), int), np.cumsum(present, axis=1)], axis=1)
    edges = sorted({0, frames, *(c for c in cuts if 0 < c < frames)})
    for begin, end in itertools.pairwise(edges):
        span = min(MOTION_SPAN, end - begin)
        if span < 2:
            continue
        first = np.clip(np.arange(begin, end) - span // 2, begin, end - span)
        velocity = (path[:, first + span - 1] - path[:, first]) / (span - 1)
        visible = seen[:, first + span] - seen[:, first] >= span - 1
        codes[:, begin:end] = np.where(visible, _direction(world, velocity), UNKNOWN)
    return codes


def _direction(world: World, velocity: np.ndarray) -> np.ndarray:
    """Code of a velocity [..., 2] in pixels per frame."""
    speed = np.linalg.norm(velocity, axis=-1) / world.speed
    along = velocity @ MOTION_TABLE.T / np.maximum(np.linalg.norm(velocity, axis=-1), 1e-9)[..., None]
    best = along.argmax(-1)
    still = int(np.flatnonzero(~MOTION_TABLE.any(-1))[0])
    clear = (speed > 0.5) & (speed < 1.6) & (along.max(-1) > _MAX_TURN)
    return np.where(speed < 0.3, still, np.where(clear, best, UNKNOWN)).astype(np.int32)


# --- one chunk of frames --------------------------------------------------------------------------


def _read_chunk(world: World, video: np.ndarray, keep: int) -> dict[str, np.ndarray]:
    """Reads the first `keep` of n frames; a frame beyond them only serves the differences."""
    require(bool(np.isfinite(video).all()), "video has values that are not finite: nothing can be measured")
    # Channels first inside this module: numpy is slow at reducing a last axis of 3.
    pixels = np.ascontiguousarray(np.moveaxis(video, -1, 1), np.float32)  # [n, 3, Y, X]
    rgb: np.ndarray = np.clip(pixels, -1, 1) / 2 + np.float32(0.5)
    constant, gradient = _fit_background(world, rgb)
    u, v = unit_coordinates(world)
    plane = gradient[:, :1, None] * u + gradient[:, 1:, None] * v[:, None]  # [n, Y, X]
    backdrop = constant[:, :, None, None] + plane[:, None]  # [n, 3, Y, X]
    sprite_rgb, alpha = _sprite_coverage(rgb, backdrop)
    contrast = np.linalg.norm(sprite_rgb - constant, axis=-1)
    crop = _find(world, alpha)
    size = np.sqrt(np.maximum(crop.area, 1) / np.pi)
    low, high = world.size_range
    present = (contrast > _MIN_CONTRAST) & (size > 0.6 * low) & (size < 1.4 * high)
    shape, iou = _match(crop, np.minimum(size, 1.5 * high), np.count_nonzero(alpha > 0.5, axis=(1, 2)))
    sprite = _Sprite(np.where(present, shape, UNKNOWN), crop.centre, size)
    template = _draw(world, sprite, crop.centre)
    colour, shade = _name_colour(sprite_rgb)
    away = np.linalg.norm(constant[:, None] - BACKGROUND_TABLE, axis=-1)  # [n, backgrounds]
    readings = {
        "shape": np.where(iou > _MIN_IOU, sprite.shape, UNKNOWN),
        "colour": np.where(present, colour, UNKNOWN),
        "backdrop": np.where(away.min(-1) < _BACKGROUND_TOLERANCE, away.argmin(-1), UNKNOWN),
        "present": present,
        "centre": np.mod(crop.centre, (world.width, world.height)),
        "size": size,
        "shade": shade,
        "gradient": gradient,
        "sprite_rgb": sprite_rgb,
        "background_rgb": constant,
        "contrast": contrast * present,
        "iou": iou * present,
        "sharpness": _edge_slope(crop.alpha) * present,
    }
    field = sprite_rgb[:, :, None, None] - backdrop  # what full coverage would add, [n, 3, Y, X]
    unexplained = (rgb - backdrop - template[:, None] * field).reshape(len(rgb), -1)
    readings["residual"] = np.sqrt(np.einsum("ni,ni->n", unexplained, unexplained) / unexplained.shape[1])
    differences = _differences(world, rgb, field, sprite, template)
    return {name: array[:keep] for name, array in (readings | differences).items()}


@dataclasses.dataclass(frozen=True)
class _Crop:
    """The sprite's surroundings, cut out across the torus's seam.

    Attributes:
      alpha: coverage [n, k, k].
      dx: columns relative to the centroid, [n, k].
      dy: rows relative to the centroid, [n, k].
      centre: centroid (x, y) in pixels, not wrapped, [n, 2].
      area: covered pixels, [n].
    """

    alpha: np.ndarray
    dx: np.ndarray
    dy: np.ndarray
    centre: np.ndarray
    area: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Sprite:
    """Shape code (or `UNKNOWN`: nothing to draw) [n], centre [n, 2] and size [n] of each frame."""

    shape: np.ndarray
    centre: np.ndarray
    size: np.ndarray


def _fit_background(world: World, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares plane of intensity over what does not stand out.

    Returns:
      Colour at the centre [n, 3] and gradient (right, down) [n, 2], common to the channels.
    """
    u, v = unit_coordinates(world)
    u, v = (a.ravel() for a in np.broadcast_arrays(u, v[:, None]))
    basis = np.stack([np.ones_like(u), u, v], axis=1)  # [Y * X, 3]
    products = (basis[:, :, None] * basis[:, None, :]).reshape(-1, 9)
    flat = rgb.reshape(*rgb.shape[:2], -1)  # [n, 3, Y * X]
    constant = np.median(rgb[:, :, ::3, ::3].reshape(*rgb.shape[:2], -1), axis=2)
    gradient = np.zeros((len(rgb), 2), np.float32)
    for tolerance in (0.2, 0.1):
        off = flat - constant[..., None] - (gradient @ basis[:, 1:].T)[:, None]
        weight = (np.abs(off).max(1) < tolerance).astype(np.float32)  # [n, Y * X]
        moments = (weight @ products).reshape(-1, 3, 3).astype(np.float64) + 1e-3 * np.eye(3)
        slope = np.linalg.solve(moments, ((weight * off.mean(1)) @ basis)[..., None])[:, 1:, 0]
        slope = slope.astype(np.float32)
        gradient = gradient + slope
        off -= (slope @ basis[:, 1:].T)[:, None]
        total = np.maximum(weight.sum(1, keepdims=True), 1)
        constant = constant + (off @ weight[..., None])[..., 0] / total
    return constant, gradient


def _sprite_coverage(rgb: np.ndarray, backdrop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour of the sprite's interior [n, 3], and the signed coverage [n, Y, X] it explains."""
    difference = rgb - backdrop
    energy = np.einsum("ncyx,ncyx->nyx", difference, difference)
    weight = np.where(energy > _MIN_CONTRAST**2, energy, 0)
    flat = rgb.reshape(*rgb.shape[:2], -1)  # [n, 3, Y * X]
    # First from whatever stands out, then from its better covered part, then from the interior alone.
    for threshold in (0.6, 0.85, 1.0):
        total = weight.sum((1, 2))[:, None]
        weighted = (flat @ weight.reshape(len(rgb), -1, 1))[..., 0]
        colour = np.where(total > 0, weighted / np.maximum(total, 1e-6), backdrop.mean((2, 3)))
        full = colour[:, :, None, None] - backdrop  # difference where the sprite covers all
        square = np.maximum(np.einsum("ncyx,ncyx->nyx", full, full), _MIN_CONTRAST**2)
        alpha = np.einsum("ncyx,ncyx->nyx", difference, full) / square
        weight = (alpha > threshold).astype(np.float32)
    return colour, np.clip(alpha, -0.5, 1.2)


def _find(world: World, alpha: np.ndarray) -> _Crop:
    """Cuts out the place where a disc of typical size covers most, centred on the centroid there."""
    middle = np.array([[world.width / 2, world.height / 2]])
    dx, dy = offsets(world, middle)
    disc = (dx[:, None, :] ** 2 + dy[:, :, None] ** 2 < (0.6 * sum(world.size_range)) ** 2).astype(np.float32)
    spectrum = np.fft.rfft2(alpha) * np.conj(np.fft.rfft2(disc))
    score = np.fft.irfft2(spectrum, s=alpha.shape[1:]).reshape(len(alpha), -1)
    row, column = np.divmod(score.argmax(-1), world.width)
    # The disc sits in the middle of its picture, so a shift of 0 means the middle.
    peak = np.stack([column, row], axis=1) + middle.astype(int)
    half = int(np.ceil(2 * world.size_range[1]))
    grid = np.arange(-half, half)
    rows = np.mod(peak[:, 1:] + grid, world.height)
    columns = np.mod(peak[:, :1] + grid, world.width)
    crop = alpha[np.arange(len(alpha))[:, None, None], rows[:, :, None], columns[:, None, :]]
    solid = np.clip(crop, 0, 1) * (crop > 0.25)
    shift = np.zeros((len(alpha), 2))
    reach = 1.9 * world.size_range[1]
    for _ in range(3):
        dx = (grid + 0.5 - shift[:, :1]).astype(np.float32)
        dy = (grid + 0.5 - shift[:, 1:]).astype(np.float32)
        near = solid * (dx[:, None, :] ** 2 + dy[:, :, None] ** 2 < reach**2)
        across, down = near.sum(1), near.sum(2)  # [n, k] each
        mass = np.maximum(across.sum(-1), 1e-6)
        shift += np.stack([(across * dx).sum(-1), (down * dy).sum(-1)], axis=1) / mass[:, None]
    dx, dy = (grid + 0.5 - shift[:, i : i + 1] for i in range(2))
    area = np.count_nonzero(near > 0.5, axis=(1, 2))
    return _Crop(crop, dx.astype(np.float32), dy.astype(np.float32), peak + shift, area)


def _match(crop: _Crop, size: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best shape [n] and its intersection over union [n] with all that is covered in the frame.

    Correlation names the shape because a blur hardly moves it; a blurred sprite also looks larger than
    it is, so smaller templates are tried as well.

    Args:
      crop: the sprite's surroundings.
      size: size from the area, [n].
      covered: covered pixels of the whole frame, [n].
    """
    mask = crop.alpha > 0.5
    centred = crop.alpha - crop.alpha.mean((1, 2), keepdims=True)
    spread = np.sqrt(np.einsum("nyx,nyx->n", centred, centred))
    likeness, overlap = [], []
    for shape in range(len(SHAPES)):
        correlations, ious = [], []
        for scale in _TEMPLATE_SCALES:
            template = coverage(shape, crop.dx, crop.dy, scale * size)
            mean = template.mean((1, 2))
            norm = np.sqrt(np.einsum("nyx,nyx->n", template, template) - template[0].size * mean**2)
            product = np.einsum("nyx,nyx->n", template, centred)
            correlations.append(product / np.maximum(norm * spread, 1e-6))
            inside = template > 0.5
            common = np.count_nonzero(inside & mask, axis=(1, 2))
            union = np.count_nonzero(inside, axis=(1, 2)) + covered - common
            ious.append(common / np.maximum(union, 1))
        likeness.append(np.max(correlations, axis=0))
        overlap.append(np.max(ious, axis=0))
    best = np.argmax(likeness, axis=0)
    return best.astype(np.int32), np.stack(overlap)[best, np.arange(len(size))]


def _draw(world: World, sprite: _Sprite, centre: np.ndarray) -> np.ndarray:
    """Coverage of each sprite at the given centres [n, 2]; nothing where the shape is unknown."""
    drawn = np.zeros((len(centre), world.height, world.width), np.float32)
    for code in range(len(SHAPES)):
        rows = np.flatnonzero(sprite.shape == code)
        if len(rows):
            drawn[rows] = coverage(code, *offsets(world, centre[rows]), sprite.size[rows])
    return drawn


def _edge_slope(alpha: np.ndarray) -> np.ndarray:
    """Mean slope of the coverage, weighted by itself: high where the edge is a step, [n]."""
    solid = np.clip(alpha, 0, 1)
    across = (np.roll(solid, -1, 2) - np.roll(solid, 1, 2)) / 2
    down = (np.roll(solid, -1, 1) - np.roll(solid, 1, 1)) / 2
    square = across * across + down * down
    square *= square > 0.1**2  # the noise of a flat area is no edge
    return square.sum((1, 2)) / np.maximum(np.sqrt(square).sum((1, 2)), 1e-6)


def _name_colour(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code of the nearest palette hue, or `UNKNOWN` [n], and the shade of that colour [n]."""
    hsv = np.array([colorsys.rgb_to_hsv(*map(float, row)) for row in rgb])
    error = np.abs(wrap(hsv[:, :1] - _PALETTE_HUES, 1.0))  # [n, colours]
    nearest = error.argmin(-1)
    palette = COLOUR_TABLE[nearest]
    shade = (rgb * palette).sum(-1) / (palette * palette).sum(-1)
    named = (error.min(-1) < _MAX_HUE_ERROR) & (hsv[:, 1] > _MIN_SATURATION)
    return np.where(named, nearest, UNKNOWN), shade


def _differences(
    world: World, rgb: np.ndarray, field: np.ndarray, sprite: _Sprite, template: np.ndarray
) -> dict[str, np.ndarray]:
    """Change between neighbouring frames, in all and beyond the sprite's motion, each [n - 1].

    The motion explains what moving the sprite of frame v, unaltered, to its place in v + 1 changes.

    Args:
      world: geometry.
      rgb: frames [n, 3, Y, X].
      field: what full coverage would add to the background, [n, 3, Y, X].
      sprite: what was read.
      template: coverage of the sprites, [n, Y, X].
    """
    difference = rgb[1:] - rgb[:-1]
    change = np.abs(difference).mean((1, 2, 3))
    followed = (sprite.shape[:-1] != UNKNOWN) & (sprite.shape[1:] != UNKNOWN)
    earlier = _Sprite(np.where(followed, sprite.shape[:-1], UNKNOWN), sprite.centre[:-1], sprite.size[:-1])
    moved = _draw(world, earlier, sprite.centre[1:]) - template[:-1] * followed[:, None, None]
    difference -= moved[:, None] * field[:-1]
    return {"change": change, "flicker": np.abs(difference).mean((1, 2, 3))}
