"""Gradients of the Pallas attention for Hopper GPUs.

One set of keys at a time: with the log-sum-exp of the whole row at hand, the keys that come with the
queries and the cached ones are independent of each other, and the gradients of the queries add up. Two
kernels: `query_gradient` holds queries and streams keys, `key_gradients` holds keys and streams queries.
As in the forward pass a third warpgroup copies, and arrays end where they end.

Logits and their gradients are float32; weights and logit gradients are rounded to the input type
before they are multiplied, and products accumulate in float32.

Source: FlashAttention 2 (arXiv 2307.08691), algorithm 2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.ops.windowed_attention import mosaic_gpu_parts as parts
from longlive_jax.ops.windowed_attention.mosaic_gpu_parts import COMPUTE_GROUPS, LOG2E
from longlive_jax.ops.windowed_attention.tiling import COPY_REGISTERS, BackwardTiling
from longlive_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Keys:
    """One set of keys and values.

    Attributes:
      key: `[R, K, N, H]`.
      value: `[R, K, N, H]`.
      rows: int32 `[B]`, which of the R rows each sample attends to.
      lengths: int32 `[B]`, how many of the K keys are valid.
    """

    key: Array
    value: Array
    rows: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class Queries:
    """What the forward pass leaves behind.

    Attributes:
      query: `[B, T, N, H]`.
      out_gradient: `[B, T, N, H]`.
      lse: float32 `[B, N, T']`, log-sum-exp of the scaled logits in base 2; T' is T, rounded up to tiles.
      delta: float32 `[B, N, T']`, the product of output and output gradient, summed over H.
    """

    query: Array
    out_gradient: Array
    lse: Array
    delta: Array


class _Stream:
    """Shared memory that one warpgroup fills and the others empty, slot by slot."""

    def __init__(self, buffers: Any, ready: Any, free: Any, stages: int) -> None:
        self.buffers, self._ready, self._free, self._stages = buffers, ready, free, stages

    def slot(self, i: Array) -> Array:
        return lax.rem(i, jnp.int32(self._stages))

    def wait(self, i: Array) -> list[Any]:
        """The buffers of step `i`, filled."""
        slot = self.slot(i)
        for ready in self._ready:
            plgpu.barrier_wait(ready.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]

    def release(self, i: Array) -> None:
        plgpu.barrier_arrive(self._free.at[self.slot(i)])

    def fill(self, steps: Array, sources: Callable[[Array], list[Any]]) -> None:
        """Copies the `sources` of every step, as far ahead as there are slots."""

        def copy(i: Array, slot: Any) -> None:
            for part, buffer, ready in zip(sources(i), self.buffers, self._ready, strict=True):
                plgpu.copy_gmem_to_smem(part, buffer.at[slot], ready.at[slot])

        for slot in range(self._stages):
            pl.when(slot < steps)(functools.partial(copy, jnp.int32(slot), slot))

        def refill(i: Array, _: None) -> None:
            plgpu.barrier_wait(self._free.at[self.slot(i)])
            copy(i, self.slot(i))

        lax.fori_loop(self._stages, steps, refill, None)
        # Every barrier is left as it was found.
        for slot in range(self._stages):
            pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, self._free.at[slot]))


def _hold(pairs: list[tuple[Any, Any]], ready: list[Any], group: Array) -> None:
    """Copies what a warpgroup keeps, and waits for it."""
    for (source, buffer), barrier in zip(pairs, ready, strict=True):
        plgpu.copy_gmem_to_smem(source, buffer, barrier.at[group])
    for barrier in ready:
        plgpu.barrier_wait(barrier.at[group])


# --- gradient of the queries ------------------------------------------------------------------------


def _query_kernel(*refs: Any, tiling: BackwardTiling, scale: float) -> None:
    lengths, rows, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, dq_ref, *scratch = refs
    q_smem, do_smem, lse_smem, delta_smem, *held, k_smem, v_smem, k_ready, v_ready, free = scratch
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    group, length, block_q = lax.axis_index("group"), lengths[batch], tiling.block_q
    stream = _Stream((k_smem, v_smem), (k_ready, v_ready), free, tiling.stages)
    full, steps = length // tiling.block_kv, pl.cdiv(length, jnp.int32(tiling.block_kv))

    @pl.when(group < COMPUTE_GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(tiling.compute_registers, action="increase")
        start = (tile * COMPUTE_GROUPS + group) * block_q
        place, line = (batch, pl.ds(start, block_q), head), (batch, head, pl.ds(start, block_q))
        mine = [x.at[group] for x in (q_smem, do_smem, lse_smem, delta_smem)]
        sources = [q_ref.at[place], do_ref.at[place], lse_ref.at[line], delta_ref.at[line]]
        _hold(list(zip(sources, mine, strict=True)), held, group)
        queries, gradients = mine[:2]
        lse, delta = (parts.load_line(x, parts.ROWS) for x in mine[2:])

        def step(i: Array, carry: tuple[Array, ...], *, is_masked: bool) -> tuple[Array, ...]:
            total, lse, delta = carry
            keys, values = stream.wait(i)
            logits = parts.multiply(queries, parts.transposed(keys))
            weights = jnp.exp2(logits * (scale * LOG2E) - parts.spread(lse, logits.shape, 0))
            if is_masked:
                is_valid = parts.column_ids(logits.shape) < length - i * tiling.block_kv
                weights = jnp.where(is_valid, weights, 0.0)
            products = parts.multiply(gradients, parts.transposed(values))
            change = weights * (products - parts.spread(delta, logits.shape, 0))
            total = parts.accumulate(total, change.astype(q_ref.dtype), keys)
            stream.release(i)
            return total, lse, delta

        zeros = parts.filled((block_q, q_ref.shape[-1]), 0, plgpu.Layout.WGMMA)
        carry = lax.fori_loop(0, full, functools.partial(step, is_masked=False), (zeros, lse, delta))
        total, *_ = lax.fori_loop(full, steps, functools.partial(step, is_masked=True), carry)
        queries[...] = (total * scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, dq_ref.at[place])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == COMPUTE_GROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        row = rows[batch]

        def sources(i: Array) -> list[Any]:
            place = (row, pl.ds(i * tiling.block_kv, tiling.block_kv), head)
            return [k_ref.at[place], v_ref.at[place]]

        stream.fill(steps, sources)


def query_gradient(queries: Queries, keys: Keys, *, tiling: BackwardTiling, interpret: Any = None) -> Array:
    """What these keys contribute to the gradient of the queries, `[B, T, N, H]`."""
    query = queries.query
    _, query_len, _, head_dim = query.shape
    block = (COMPUTE_GROUPS, tiling.block_q)
    stage = (tiling.stages, tiling.block_kv, head_dim)
    scratch = (
        *[parts.swizzled(*block, head_dim, dtype=query.dtype)] * 2,
        *[plgpu.SMEM(block, jnp.float32)] * 2,
        *[plgpu.Barrier(num_barriers=COMPUTE_GROUPS)] * 4,
        *[parts.swizzled(*stage, dtype=query.dtype)] * 2,
        *[plgpu.Barrier(num_barriers=tiling.stages)] * 2,
        plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=tiling.stages),
    )
    return _call(
        _query_kernel,
        queries,
        keys,
        tiling=tiling,
        tiles=pl.cdiv(query_len, COMPUTE_GROUPS * tiling.block_q),
        out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch=scratch,
        name="windowed_attention_query_gradient",
        interpret=interpret,
    )


# --- gradients of keys and values ---------------------------------------------------------------------


def _key_kernel(*refs: Any, tiling: BackwardTiling, scale: float) -> None:
    lengths, rows, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref, *scratch = refs
    k_smem, v_smem, *rest = scratch
    held, (q_smem, do_smem, lse_smem, delta_smem), (*ready, free) = rest[:2], rest[2:6], rest[6:]
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    group, block_kv = lax.axis_index("group"), tiling.block_held
    stream = _Stream((q_smem, do_smem, lse_smem, delta_smem), ready, free, tiling.stages)
    # Nothing to do where no key of the block is valid; the result is zero there.
    is_valid = tile * COMPUTE_GROUPS * block_kv < lengths[batch]
    steps = jnp.where(is_valid, pl.cdiv(q_ref.shape[1], tiling.block_stream), 0)

    @pl.when(group < COMPUTE_GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(tiling.compute_registers, action="increase")
        place = pl.ds((tile * COMPUTE_GROUPS + group) * block_kv, block_kv)
        source, keys, values = (rows[batch], place, head), k_smem.at[group], v_smem.at[group]
        _hold([(k_ref.at[source], keys), (v_ref.at[source], values)], held, group)

        def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            key_total, value_total = carry
            queries, gradients, lse_part, delta_part = stream.wait(i)
            logits = parts.multiply(keys, parts.transposed(queries))  # [K, T]
            lse = parts.load_line(lse_part, parts.COLUMNS)
            weights = jnp.exp2(logits * (scale * LOG2E) - parts.spread(lse, logits.shape, 1))
            value_total = parts.accumulate(value_total, weights.astype(q_ref.dtype), gradients)
            products = parts.multiply(values, parts.transposed(gradients))
            delta = parts.load_line(delta_part, parts.COLUMNS)
            change = weights * (products - parts.spread(delta, logits.shape, 1))
            key_total = parts.accumulate(key_total, change.astype(q_ref.dtype), queries)
            stream.release(i)
            return key_total, value_total

        zeros = parts.filled((block_kv, q_ref.shape[-1]), 0, plgpu.Layout.WGMMA)
        key_total, value_total = lax.fori_loop(0, steps, step, (zeros, zeros))
        keys[...] = (key_total * scale).astype(q_ref.dtype)
        values[...] = value_total.astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(keys, dk_ref.at[batch, place, head])
        plgpu.copy_smem_to_gmem(values, dv_ref.at[batch, place, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == COMPUTE_GROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def sources(i: Array) -> list[Any]:
            part = pl.ds(i * tiling.block_stream, tiling.block_stream)
            place, line = (batch, part, head), (batch, head, part)
            return [q_ref.at[place], do_ref.at[place], lse_ref.at[line], delta_ref.at[line]]

        stream.fill(steps, sources)


def key_gradients(
    queries: Queries, keys: Keys, *, tiling: BackwardTiling, interpret: Any = None
) -> tuple[Array, Array]:
    """Gradients `[B, K, N, H]` of the keys and values of each sample; zero where they are not valid."""
    dtype = queries.query.dtype
    batch, _, heads, head_dim = queries.query.shape
    key_len = keys.key.shape[1]
    block = (COMPUTE_GROUPS, tiling.block_held, head_dim)
    stage = (tiling.stages, tiling.block_stream)
    scratch = (
        *[parts.swizzled(*block, dtype=dtype)] * 2,
        *[plgpu.Barrier(num_barriers=COMPUTE_GROUPS)] * 2,
        *[parts.swizzled(*stage, head_dim, dtype=dtype)] * 2,
        *[plgpu.SMEM(stage, jnp.float32)] * 2,
        *[plgpu.Barrier(num_barriers=tiling.stages)] * 4,
        plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=tiling.stages),
    )
    shape = jax.ShapeDtypeStruct((batch, key_len, heads, head_dim), dtype)
    found = _call(
        _key_kernel,
        queries,
        keys,
        tiling=tiling,
        tiles=pl.cdiv(key_len, COMPUTE_GROUPS * tiling.block_held),
        out_type=(shape, shape),
        scratch=scratch,
        name="windowed_attention_key_gradients",
        interpret=interpret,
    )
    is_valid = (jnp.arange(key_len) < keys.lengths[:, None])[..., None, None]
    key_gradient, value_gradient = (jnp.where(is_valid, x, 0) for x in found)
    return key_gradient, value_gradient


def _call(
    kernel: Callable[..., None],
    queries: Queries,
    keys: Keys,
    *,
    tiling: BackwardTiling,
    tiles: int,
    out_type: Any,
    scratch: tuple[Any, ...],
    name: str,
    interpret: Any,
) -> Any:
    batch, _, heads, head_dim = queries.query.shape
    run = plgpu.kernel(
        functools.partial(kernel, tiling=tiling, scale=1 / math.sqrt(head_dim)),
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch, heads, tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="group",
        kernel_name=name,
        compiler_params=parts.compiler_params(),
        interpret=interpret,
    )
    return run(
        keys.lengths,
        keys.rows,
        queries.query,
        queries.out_gradient,
        queries.lse,
        queries.delta,
        keys.key,
        keys.value,
    )
