"""The forward pass for Hopper GPUs (H100, H200): a Pallas kernel that reads the cache where it lies.

Three warpgroups share a tile of queries. One only copies: it streams tiles of keys and values into a
ring of shared memory with the tensor memory accelerator. The other two hold 64 (or more) queries each
and take turns: while one multiplies, the other does its softmax. The keys that come with the queries
and the cached ones are two arrays and stay two arrays. Their full tiles come first and the tiles that
are cut off by the end of the array or by the length come last, so only those are masked; rows beyond
the end of an array are filled with zeros by the copy engine, so nothing is padded.

Few tiles of queries leave multiprocessors idle in the last wave. Splits divide the keys of a tile
between several blocks; their results are put together by their log-sum-exp.

Products accumulate in float32, the running maximum, sum and output are float32, and probabilities are
rounded to the input type before the second product. The backward pass is in `mosaic_gpu_backward`.

Source: FlashAttention 3 (arXiv 2407.08608), flash decoding for the splits.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.ops.windowed_attention import mosaic_gpu_parts as parts
from longlive_jax.ops.windowed_attention.mosaic_gpu_parts import COMPUTE_GROUPS, LOG2E
from longlive_jax.ops.windowed_attention.tiling import COPY_REGISTERS, Tiling
from longlive_jax.types import Array


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of keys of one block of the grid, in the order they are worked through.

    Attributes:
      size: keys of a tile.
      own: keys that come with the queries.
      cached: valid keys of the cache.
    """

    size: int
    own: int
    cached: Array

    @property
    def full(self) -> Array:
        """Tiles without a mask; they come first."""
        return self.own // self.size + self.cached // self.size

    @property
    def total(self) -> Array:
        has_own_tail = 1 if self.own % self.size else 0
        return self.full + has_own_tail + (self.cached % self.size > 0).astype(jnp.int32)

    def _is_own_tail(self, step: Array) -> Array:
        return (step == self.full) & (self.own % self.size > 0)

    def is_own(self, step: Array) -> Array:
        return (step < self.own // self.size) | self._is_own_tail(step)

    def own_start(self, step: Array) -> Array:
        return jnp.minimum(step, self.own // self.size) * self.size

    def cached_start(self, step: Array) -> Array:
        return jnp.minimum(step - self.own // self.size, self.cached // self.size) * self.size

    def valid(self, step: Array) -> Array:
        """Valid keys of one of the last tiles."""
        return jnp.where(self._is_own_tail(step), self.own % self.size, self.cached % self.size)


def _forward_kernel(*refs: Any, tiling: Tiling, own: int, has_cache: bool, scale: float) -> None:
    """One tile of queries of one head against one share of its keys."""
    inputs, (out_ref, lse_ref), scratch = _grouped(refs, 7 if has_cache else 5)
    lengths, rows, q_ref, *sources = inputs
    q_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
    batch, head, split, tile = (lax.axis_index(name) for name in ("batch", "head", "split", "tile"))
    group = lax.axis_index("group")
    tiles = _Tiles(tiling.block_kv, own, lengths[batch] if has_cache else jnp.int32(0))
    share = (tiles.total * split // tiling.splits, tiles.total * (split + 1) // tiling.splits)
    stages = tiling.stages

    @pl.when(group < COMPUTE_GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(tiling.compute_registers, action="increase")
        start = tile * COMPUTE_GROUPS * tiling.block_q + group * tiling.block_q
        queries = q_smem.at[group]
        plgpu.copy_gmem_to_smem(
            q_ref.at[batch, pl.ds(start, tiling.block_q), head], queries, q_ready.at[group]
        )
        plgpu.barrier_wait(q_ready.at[group])

        def meet() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(i: Array, carry: tuple[Array, ...], *, is_masked: bool) -> tuple[Array, ...]:
            out, top, total = carry
            slot = lax.rem(i - share[0], jnp.int32(stages))
            plgpu.barrier_wait(k_ready.at[slot])
            logits = parts.multiply(queries, parts.transposed(k_smem.at[slot]), meet)
            plgpu.barrier_arrive(k_free.at[slot])
            if is_masked:
                logits = jnp.where(parts.column_ids(logits.shape) < tiles.valid(i), logits, -jnp.inf)
            # In base 2, with the scale folded in: one multiply-add and one exp2 a weight.
            new_top = jnp.maximum(top, logits.max(axis=1) * (scale * LOG2E))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(logits * (scale * LOG2E) - parts.spread(new_top, logits.shape, 0))
            total = total * shrink + weights.sum(axis=1)
            out = out * parts.spread(shrink, out.shape, 0)
            rounded = weights.astype(q_ref.dtype)
            out, total, new_top, rounded = lax.optimization_barrier((out, total, new_top, rounded))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            out = parts.accumulate(out, rounded, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return out, new_top, total

        # The second group stays half a tile behind the first.
        pl.when(group == 1)(meet)
        shape = (tiling.block_q, q_ref.shape[-1])
        carry = (
            parts.filled(shape, 0, plgpu.Layout.WGMMA),
            parts.filled(shape[:1], -math.inf, parts.ROWS),
            parts.filled(shape[:1], 0, parts.ROWS),
        )
        unmasked = jnp.clip(tiles.full, *share)
        carry = lax.fori_loop(share[0], unmasked, functools.partial(step, is_masked=False), carry)
        carry = lax.fori_loop(unmasked, share[1], functools.partial(step, is_masked=True), carry)
        pl.when(group == 0)(meet)

        out, top, total = carry
        inverse = jnp.where(total > 0, 1 / total, 0.0)  # a share may be empty
        out = out * parts.spread(inverse, shape, 0)
        lse = (top + jnp.log(total) * LOG2E) * (1 / LOG2E)
        lse_ref[split, batch, head, pl.ds(start, tiling.block_q)] = lse
        if tiling.splits > 1:
            out_ref[split, batch, head, pl.ds(start, tiling.block_q)] = out
        else:
            queries[...] = out.astype(q_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, out_ref.at[batch, pl.ds(start, tiling.block_q), head])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(group == COMPUTE_GROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def load(i: Array, source: int, buffer: Any, ready: Any, slot: Any) -> None:
            def copy(ref: Any, row: Array, start: Array) -> None:
                part = ref.at[row, pl.ds(start, tiling.block_kv), head]
                plgpu.copy_gmem_to_smem(part, buffer.at[slot], ready.at[slot])

            if not has_cache:
                copy(sources[source], batch, tiles.own_start(i))
                return
            is_own = tiles.is_own(i)
            pl.when(is_own)(lambda: copy(sources[source], batch, tiles.own_start(i)))
            cached_row = rows[batch]
            pl.when(jnp.logical_not(is_own))(
                lambda: copy(sources[2 + source], cached_row, tiles.cached_start(i))
            )

        def load_both(i: Array, slot: Any, wait: bool) -> None:
            for source, buffer, ready, free in ((0, k_smem, k_ready, k_free), (1, v_smem, v_ready, v_free)):
                if wait:
                    plgpu.barrier_wait(free.at[slot])
                load(i, source, buffer, ready, slot)

        for slot in range(stages):
            i = share[0] + slot
            pl.when(i < share[1])(functools.partial(load_both, i, slot, wait=False))

        def refill(i: Array, _: None) -> None:
            load_both(i, lax.rem(i - share[0], jnp.int32(stages)), wait=True)

        lax.fori_loop(share[0] + stages, share[1], refill, None)
        # Every barrier is left as it was found.
        for slot in range(stages):
            for free in (k_free, v_free):
                pl.when(share[0] + slot < share[1])(functools.partial(plgpu.barrier_wait, free.at[slot]))


def _grouped(refs: tuple[Any, ...], inputs: int) -> tuple[Any, Any, Any]:
    return refs[:inputs], refs[inputs : inputs + 2], refs[inputs + 2 :]


def forward(
    query: Array,
    key: Array,
    value: Array,
    cache: tuple[Array, Array, Array, Array] | None,
    *,
    tiling: Tiling,
    own: int,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """The kernel and, where keys are split, what puts the shares together.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, K, N, H]`.
      value: `[B, K, N, H]`.
      cache: `[R, K', N, H]` keys and values, int32 `[B]` rows of them, int32 `[B]` valid keys.
      tiling: how the work is cut.
      own: how many of K are valid.
      interpret: passed to Pallas.

    Returns:
      `[B, T, N, H]` and the log-sum-exp of the scaled logits, float32 `[B, N, T]`.
    """
    batch, query_len, heads, head_dim = query.shape
    per_tile = COMPUTE_GROUPS * tiling.block_q
    tiles = pl.cdiv(query_len, per_tile)
    padded, splits, stages = tiles * per_tile, tiling.splits, tiling.stages
    out_type = jax.ShapeDtypeStruct(query.shape, query.dtype)
    if splits > 1:
        out_type = jax.ShapeDtypeStruct((splits, batch, heads, padded, head_dim), jnp.float32)
    lse_type = jax.ShapeDtypeStruct((splits, batch, heads, padded), jnp.float32)
    nothing = jnp.zeros(batch, jnp.int32)
    *cached, rows, lengths = (nothing, nothing) if cache is None else cache
    shape = (stages, tiling.block_kv, head_dim)
    out, lse = plgpu.kernel(
        functools.partial(
            _forward_kernel,
            tiling=tiling,
            own=own,
            has_cache=cache is not None,
            scale=1 / math.sqrt(head_dim),
        ),
        out_type=(out_type, lse_type),
        scratch_types=(
            parts.swizzled(COMPUTE_GROUPS, tiling.block_q, head_dim, dtype=query.dtype),
            parts.swizzled(*shape, dtype=key.dtype),
            parts.swizzled(*shape, dtype=value.dtype),
            plgpu.Barrier(num_barriers=COMPUTE_GROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
        ),
        # The last axis runs fastest: blocks that run together read the same keys.
        grid=(batch, heads, splits, tiles),
        grid_names=("batch", "head", "split", "tile"),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="group",
        kernel_name="windowed_attention",
        compiler_params=parts.compiler_params(),
        interpret=interpret,
    )(lengths, rows, query, key, value, *cached)
    return _joined(out, lse, query)


def _joined(out: Array, lse: Array, query: Array) -> tuple[Array, Array]:
    query_len = query.shape[1]
    lse = lse[..., :query_len]  # [S, B, N, T]
    if lse.shape[0] == 1:
        return out, lse[0]
    top = jnp.max(lse, axis=0)
    share = jnp.exp(lse - top)
    total = jnp.sum(share, axis=0)
    mixed = jnp.einsum("sbnt,sbnth->btnh", share / total, out[..., :query_len, :])
    return mixed.astype(query.dtype), top + jnp.log(total)
