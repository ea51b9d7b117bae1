"""One layer at a time over a frame that is cut into tiles, with the result of the whole frame.

The activations of a decoder grow with the frame; what a convolution needs beside its input and its output
(normalised copies, the frames joined to their history, a library's workspace) grows with them. Here a
layer walks over its input in windows, so that all of this has the size of one window.

A window is a tile with a halo as wide as the layer sees, and it never leaves the frame: at the frame's edge
it is shifted inwards. So its own zero padding falls either on the frame's edge, where the whole frame has it
too, or on a window's edge inside the frame, where it spoils the halo and nothing else. Every value of a tile
is the same sum as without tiles; there are no seams to blend. Because the halo is that of one layer and not
of the whole decoder (13 latents for Wan's), little is computed twice.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.types import Array

Span: TypeAlias = tuple[Array, Array]
"""First row and first column."""

_ROWS, _COLUMNS = 2, 3


def tiled(layer: nn.Module, x: Array, history: Any, *, tile: int, halo: int) -> tuple[Array, Any]:
    """`layer(x, history)`, tile by tile where the frame is larger than one.

    Args:
      layer: bound; maps ([B, T, y, x, D], history) to (activations, next history). Its output may be larger
        than its input by a whole factor, along rows and columns alike.
      x: [B, T, y, x, D].
      history: tree of arrays [B, n, y, x, ...] or None.
      tile: rows and columns of a tile; 0 for the whole frame.
      halo: rows and columns around a position of `x` that its output depends on.

    Returns:
      What the layer returns, up to the rounding of sums in another order.
    """
    rows, columns = x.shape[_ROWS : _COLUMNS + 1]
    if tile == 0 or max(rows, columns) <= tile:
        return layer(x, history)
    module, variables = layer.unbind()
    return over_windows(
        lambda window: module.apply(variables, *window), (x, history), rows, columns, tile=tile, halo=halo
    )


def over_windows(
    function: Callable[[Any], Any], inputs: Any, rows: int, columns: int, *, tile: int, halo: int
) -> Any:
    """Applies `function` to every window of `inputs` and puts the tiles of its outputs together.

    Args:
      function: local: its output depends on `halo` rows and columns around each position.
      inputs: tree of arrays [B, n, rows, columns, ...].
      rows: of the frame.
      columns: of the frame.
      tile: rows and columns of a tile.
      halo: see `function`.

    Returns:
      A tree of arrays [B, m, k * rows, k * columns, ...], k >= 1 by leaf.
    """
    tile_y, tile_x = min(tile, rows), min(tile, columns)
    window_y, window_x = min(tile + 2 * halo, rows), min(tile + 2 * halo, columns)

    def cut(start: Span) -> Any:
        return jax.tree.map(lambda leaf: _slice(leaf, start, (window_y, window_x)), inputs)

    def visit(whole: Any, corner: Span) -> tuple[Any, None]:
        # The last tiles are moved back into the frame; what they share with their neighbours is equal.
        top, left = jnp.minimum(corner[0], rows - tile_y), jnp.minimum(corner[1], columns - tile_x)
        start = (
            jnp.clip(top - halo, 0, rows - window_y),
            jnp.clip(left - halo, 0, columns - window_x),
        )

        def put(leaf: Array, found: Array) -> Array:
            scale = found.shape[_ROWS] // window_y
            inner = (scale * (top - start[0]), scale * (left - start[1]))
            kept = _slice(found, inner, (scale * tile_y, scale * tile_x))
            zero = jnp.zeros((), jnp.int32)
            at = (zero, zero, scale * top, scale * left, *(zero for _ in leaf.shape[4:]))
            return lax.dynamic_update_slice(leaf, kept, at)

        return jax.tree.map(put, whole, function(cut(start))), None

    origin = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    shapes = jax.eval_shape(lambda: function(cut(origin)))
    empty = jax.tree.map(lambda s: _empty(s, (window_y, window_x), (rows, columns)), shapes)
    corners = [(i, j) for i in range(0, rows, tile_y) for j in range(0, columns, tile_x)]
    tops, lefts = (jnp.asarray(values, jnp.int32) for values in zip(*corners, strict=True))
    return lax.scan(visit, empty, (tops, lefts))[0]


def _slice(leaf: Array, start: Span, size: tuple[int, int]) -> Array:
    zero = jnp.zeros((), jnp.int32)
    at = (zero, zero, *start, *(zero for _ in leaf.shape[4:]))
    return lax.dynamic_slice(leaf, at, (*leaf.shape[:2], *size, *leaf.shape[4:]))


def _empty(shape: jax.ShapeDtypeStruct, window: tuple[int, int], frame: tuple[int, int]) -> Array:
    """Zeros of a whole frame for an output of which `shape` is one window's."""
    scale = shape.shape[_ROWS] // window[0]
    return jnp.zeros((*shape.shape[:2], scale * frame[0], scale * frame[1], *shape.shape[4:]), shape.dtype)
