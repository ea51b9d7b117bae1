"""What the Pallas kernels for Hopper GPUs are put together from.

The products and everything that names a register layout are here, one place each, so that a test can
stand in for them where no GPU is.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.types import Array

LOG2E = math.log2(math.e)
COMPUTE_GROUPS = 2
"""Warpgroups that multiply; a third one copies."""

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Register layouts of one value per row, or per column, of a product."""


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory in the layout that the copy engine writes and the tensor cores read."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def compiler_params() -> Any:
    # jax 0.11 changes the default; the kernels are written for single lanes.
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def multiply(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> Array:
    """`a @ b` in float32 of two arrays in shared memory; calls `meanwhile` while it is under way."""

    def run(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, a, b)
        if meanwhile is not None:
            meanwhile()
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(total: Array, a: Array, b: Any) -> Array:
    """`total + a @ b` in float32; `a` in registers, `b` in shared memory."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load_line(ref: Any, layout: Any) -> Array:
    """A float32 vector from shared memory, one value per row or per column of a product."""
    return plgpu.layout_cast(ref[...], layout)


def column_ids(shape: tuple[int, ...]) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def spread(line: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Repeats a vector along the other axis of a product."""
    return lax.broadcast_in_dim(line, shape, [axis])
