"""Runs the Pallas kernels in Pallas' GPU interpreter on a CPU and prints the errors against the reference.

The interpreter simulates threads, barriers and shared memory, and fails where a barrier is left in another
phase than it was found in. It knows neither register layouts nor reads beyond the end of an array, so the
few operations of `mosaic_gpu_parts` are replaced, and arrays are padded here with the zeros that the
copy engine would fill in. Barriers wait for each other in the threads of XLA's pool, which has to be large
enough: run as its own process with NPROC=16, and under a timeout.

    NPROC=16 python -m tests.ops._interpreted CASE...
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.ops.windowed_attention import (
    mosaic_gpu_forward,
    mosaic_gpu_parts,
    pallas_mosaic_gpu,
    reference,
)
from longlive_jax.ops.windowed_attention.tiling import BackwardTiling, Tiling

# name: (queries, own keys, cache slots, valid lengths, heads, tiling, with gradients)
CASES = {
    "aligned": (128, 64, 64, (64,), 1, Tiling(block_kv=64), False),
    "ragged": (100, 70, 200, (130,), 1, Tiling(block_kv=64, splits=2), False),
    "one_key": (60, 1, 64, (1, 64), 1, Tiling(block_kv=64, splits=3, stages=3), False),
    "empty_cache": (60, 130, 64, (0,), 2, Tiling(block_kv=128), False),
    "no_cache": (130, 70, 0, (0,), 1, Tiling(block_kv=64), False),
    "gradients": (70, 100, 130, (65,), 1, Tiling(block_kv=64), True),
}
LAYERS, LAYER, HEAD_DIM = 2, 1, 64


def stand_in() -> object:
    """Replaces what the interpreter does not know; returns its parameters."""
    # Private: the public way to interpret is Pallas' TPU one.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    def dot(a, b):
        return lax.dot(a.astype(jnp.float32), b.astype(jnp.float32))

    def multiply(a, b, meanwhile=None):
        if meanwhile is not None:
            meanwhile()
        return dot(a[...], b[...].T)

    parts = mosaic_gpu_parts
    parts.multiply = multiply  # its second operand is transposed in every kernel
    parts.transposed = lambda ref: ref
    parts.accumulate = lambda total, a, b: total + dot(a, b[...])
    parts.filled = lambda shape, value, layout: jnp.full(shape, value, jnp.float32)
    parts.load_line = lambda ref, layout: ref[...]
    parts.column_ids = lambda shape: lax.broadcasted_iota(jnp.int32, shape, 1)
    return InterpretGPUParams()


def padded(x, multiple):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def run(name: str, interpret: object) -> dict[str, float]:
    """The largest differences from the reference in float32."""
    query_len, own, slots, lengths, heads, tiling, has_gradients = CASES[name]
    batch, random = len(lengths), np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    query = draw(batch, query_len, heads, HEAD_DIM)
    key, value = (draw(batch, own, heads, HEAD_DIM) for _ in range(2))
    cached = [draw(LAYERS * batch, slots, heads, HEAD_DIM) for _ in range(2)]
    rows = LAYER * batch + jnp.arange(batch, dtype=jnp.int32)
    length = jnp.asarray(lengths, jnp.int32)
    wide = [x.astype(jnp.float32) for x in (query, key, value, *(c[rows] for c in cached))]

    def expected(query, key, value, cached_key, cached_value):
        if slots == 0:
            return reference.attend_lse(query, key, value)
        context = {"cached_key": cached_key, "cached_value": cached_value, "cached_len": length}
        return reference.attend_lse(query, key, value, **context)

    grown = padded(query, 2 * tiling.block_q)
    keys = [padded(x, 2 * tiling.block_kv) for x in (key, value, *cached)]
    cache = (*keys[2:], rows, length) if slots else None
    out, lse = jax.jit(
        functools.partial(mosaic_gpu_forward.forward, tiling=tiling, own=own, interpret=interpret)
    )(grown, *keys[:2], cache)
    want, want_lse = expected(*wide)
    errors = {
        "out": float(jnp.abs(out[:, :query_len] - want).max()),
        "lse": float(jnp.abs(lse[..., :query_len] - want_lse).max()),
    }
    if not has_gradients:
        return errors

    def loss(*arguments):
        out, lse = expected(*arguments)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    wanted = jax.grad(loss, argnums=range(5))(*wide)
    gradients = (padded(jnp.cos(want).astype(jnp.bfloat16), 128), -jnp.sin(want_lse))
    gradients = (gradients[0], jnp.pad(gradients[1], ((0, 0), (0, 0), (0, -query_len % 128))))
    kept = (grown, *keys[:2], cache, out, lse)

    def backward(kept, gradients):
        tiling = BackwardTiling()
        *found, of_cache = pallas_mosaic_gpu.gradients_of(
            kept, gradients, tiling=tiling, own=own, interpret=interpret
        )
        return found, of_cache[:2]

    found, of_cache = jax.jit(backward)(kept, gradients)
    found = [
        found[0][:, :query_len],
        *(x[:, :own] for x in found[1:]),
        *(x[rows][:, :slots] for x in of_cache),
    ]
    for name, a, b in zip(
        ("query", "key", "value", "cached_key", "cached_value"), found, wanted, strict=True
    ):
        errors[name] = float(jnp.abs(a - b).max() / jnp.abs(b).max())
    return errors


if __name__ == "__main__":
    parameters = stand_in()
    for case in sys.argv[1:]:
        print(json.dumps({"case": case, **run(case, parameters)}), flush=True)
