"""Rotary position embedding over (frame, row, column), exact for any frame index.

Adjacent channel pairs are complex numbers. Of the H/2 pairs of a head the first
`H/2 - 2 * (H/2 // 3)` turn with the frame, the next `H/2 // 3` with the row and the last
`H/2 // 3` with the column; each group has its own ladder of base 10000.

Frames are unbounded, so there is no table for them: a float32 product `frame * frequency` loses
the angle after a few hundred frames, and a table ends somewhere. Instead the phase is a fixed-point
fraction of a turn. Frequencies are stored as 64-bit fractions; `frame * frequency` modulo one turn
is then plain wrapping integer arithmetic, accurate to 2**-32 of a turn for every int32 frame.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.types import Array, ArrayLike, pytree

BASE = 10000.0

JITTER = 0.8
"""Spread of the temporal bases over the heads with `rope: jittered` (LoL, arXiv 2601.16914)."""

_JITTER_SEED = 2601_16914  # drawn once: the same bases in every process, for every checkpoint


@pytree
class RopeTable:
    """cos and sin of every token's angles, float32 `[B or 1, F, P, H/2]`, or `[B or 1, F, P, N, H/2]` where
    the heads differ."""

    cos: Array
    sin: Array


def channel_split(head_dim: int) -> tuple[int, int, int]:
    """Complex channels that turn with (frame, row, column): 128 -> (22, 21, 21)."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def frame_angles(positions: Array, head_dim: int) -> Array:
    """Angles of the temporal channels.

    Args:
      positions: int32, any shape, any sign; frames from the start of the video.
      head_dim: H.

    Returns:
      float32 `[..., H/2 - 2 * (H/2 // 3)]` in [-pi, pi), within 1e-6 of the exact value.
    """
    high, low = _frequency_words(channel_split(head_dim)[0])
    return turn_angles(positions, high, low)


def jittered_frame_angles(positions: Array, head_dim: int, *, heads: int, jitter: float) -> Array:
    """As `frame_angles`, with a base of its own for every head: `BASE * (1 + jitter * e)`, e in [-1, 1].

    Heads that share a base return to the same phases at the same distances, and all look at the sink there.

    Args:
      positions: int32, any shape, any sign.
      head_dim: H.
      heads: N.
      jitter: in [0, 1).

    Returns:
      float32 `[..., N, H/2 - 2 * (H/2 // 3)]`.

    Source: LoL (arXiv 2601.16914), per-head RoPE jitter of the temporal band.
    """
    pairs = channel_split(head_dim)[0]
    angles = turn_angles(positions, *_jittered_words(pairs, heads, jitter))
    return angles.reshape(*angles.shape[:-1], heads, pairs)


def turn_angles(count: Array, high: np.ndarray, low: np.ndarray) -> Array:
    """`2 pi * count * frequency` wrapped to [-pi, pi), by 64-bit fixed-point arithmetic.

    Args:
      count: int32 `[...]`.
      high: uint32 `[K]`, upper word of frequency / (2 pi) * 2**64.
      low: uint32 `[K]`, lower word of the same.

    Returns:
      float32 `[..., K]`.
    """
    n = jnp.asarray(count).astype(jnp.int32)[..., None]
    magnitude = jnp.abs(n).astype(jnp.uint32)
    phase = magnitude * high + _multiply_high(magnitude, low)
    angle = phase.astype(jnp.int32).astype(jnp.float32) * np.float32(math.pi / 2**31)
    return jnp.where(n < 0, -angle, angle)


def _multiply_high(a: Array, b: ArrayLike) -> Array:
    """Upper 32 bits of the 64-bit product of two uint32 (JAX has no uint64 by default)."""
    mask, half = np.uint32(0xFFFF), np.uint32(16)
    words = jnp.asarray(b)
    a_low, a_high, b_low, b_high = a & mask, a >> half, words & mask, words >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    carry = (middle & mask) + a_low * b_high
    return a_high * b_high + (middle >> half) + (carry >> half)


def frequency_words(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits angular frequencies (float64, in [0, 2 pi)) into the two words `turn_angles` takes."""
    words = [round(float(f) / (2 * math.pi) * 2**64) for f in frequencies]
    high = np.array([w >> 32 for w in words], dtype=np.uint32)
    low = np.array([w & 0xFFFFFFFF for w in words], dtype=np.uint32)
    return high, low


@functools.cache
def _frequency_words(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    return frequency_words(_frequencies(pairs))


@functools.cache
def _jittered_words(pairs: int, heads: int, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Words of every head's temporal frequencies, one head after the other."""
    spread = np.random.Generator(np.random.Philox(_JITTER_SEED)).uniform(-1, 1, heads)
    bases = BASE * (1 + jitter * spread)
    return frequency_words((bases[:, None] ** (-np.arange(pairs, dtype=np.float64) / pairs)).ravel())


def _frequencies(pairs: int) -> np.ndarray:
    return BASE ** (-np.arange(pairs, dtype=np.float64) / pairs)


def table(
    positions: Array, rows: int, columns: int, head_dim: int, *, heads: int = 1, jitter: float = 0.0
) -> RopeTable:
    """Rotation of every patch token of the frames at `positions`.

    Args:
      positions: int32 `[F]` or `[B, F]` absolute frame positions.
      rows: patch rows of a frame.
      columns: patch columns of a frame; tokens are ordered row by row.
      head_dim: H.
      heads: N; only jitter asks.
      jitter: see `jittered_frame_angles`; 0 turns all heads alike.

    Returns:
      `RopeTable` with `[1 or B, F, rows * columns, H/2]`; with jitter a head axis before the last.
    """
    positions = jnp.atleast_2d(jnp.asarray(positions))  # [B or 1, F]
    _, row_pairs, column_pairs = channel_split(head_dim)
    if jitter:
        time = jittered_frame_angles(positions, head_dim, heads=heads, jitter=jitter)[:, :, None]
    else:
        time = frame_angles(positions, head_dim)[:, :, None, :]  # [B, F, 1, K], or [B, F, 1, N, K]
    row = np.arange(rows, dtype=np.float64)[:, None, None] * _frequencies(row_pairs)
    column = np.arange(columns, dtype=np.float64)[None, :, None] * _frequencies(column_pairs)
    shape = (rows, columns)
    plane = np.concatenate(
        [np.broadcast_to(row, (*shape, row_pairs)), np.broadcast_to(column, (*shape, column_pairs))], axis=-1
    ).reshape(rows * columns, -1)  # [P, K']

    def join(of_time: Array, of_plane: np.ndarray) -> Array:
        tokens = (*positions.shape, rows * columns, *of_time.shape[3:-1])
        plane_table = jnp.asarray(of_plane, jnp.float32)
        if jitter:
            plane_table = plane_table[:, None]  # [P, 1, K']
        return jnp.concatenate(
            [
                jnp.broadcast_to(of_time, (*tokens, of_time.shape[-1])),
                jnp.broadcast_to(plane_table, (*tokens, plane_table.shape[-1])),
            ],
            axis=-1,
        )

    return RopeTable(cos=join(jnp.cos(time), np.cos(plane)), sin=join(jnp.sin(time), np.sin(plane)))


def rotate(x: Array, rope: RopeTable) -> Array:
    """Turns queries or keys by their positions, in float32.

    Args:
      x: `[B, F, P, N, H]`.
      rope: table of the same frames and tokens.

    Returns:
      `[B, F, P, N, H]` in the dtype of `x`.
    """
    if rope.cos.ndim == x.ndim:  # every head has its own
        return _rotate_pairs(x, rope.cos, rope.sin)
    return _rotate_pairs(x, rope.cos[..., None, :], rope.sin[..., None, :])


def shift_frames(keys: Array, frames: Array, *, jitter: float = 0.0) -> Array:
    """Moves already rotated keys by `frames` positions in time (rotations compose).

    Args:
      keys: `[L, B, S, P, N, H]`.
      frames: int32 `[B]`.
      jitter: that of the rotation.

    Returns:
      `[L, B, S, P, N, H]` in the dtype of `keys`.
    """
    heads, head_dim = keys.shape[-2:]
    if jitter:
        time = jittered_frame_angles(frames, head_dim, heads=heads, jitter=jitter)  # [B, N, K]
    else:
        time = frame_angles(frames, head_dim)[:, None]  # [B, 1, K]
    still = head_dim // 2 - time.shape[-1]
    angles = jnp.pad(time, ((0, 0), (0, 0), (0, still)))[None, :, None, None]
    return _rotate_pairs(keys, jnp.cos(angles), jnp.sin(angles))


@jax.custom_vjp
def _rotate_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """Turns `[..., H]`, H/2 pairs, by `cos` and `sin`, `[..., H/2]`; the table has no gradient."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    # One read in order and one write in order: stacking the two halves of a result is far slower.
    turned = pairs * cos[..., None] + pairs[..., ::-1] * jnp.stack([-sin, sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _rotate_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rotate_pairs(x, cos, sin), (cos, sin)


def _rotate_backward(table: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    cos, sin = table
    return _rotate_pairs(gradient, cos, -sin), None, None


_rotate_pairs.defvjp(_rotate_forward, _rotate_backward)
