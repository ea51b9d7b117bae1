"""The parts `attention` and `tune` of `benchmarks.run`; attention beside tokamax's and PyTorch's."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, floors
from benchmarks.suites import Suite, compiled, draw, measured_rates, median_seconds, memory_of
from longlive_jax.errors import UserError
from longlive_jax.ops.windowed_attention import CachedContext, windowed_attention

IMPLEMENTATIONS = ("reference", "cudnn", "pallas_mosaic_gpu")
NO_LENGTH = "cudnn, no length"


def attention(suite: Suite) -> Iterator[dict[str, Any]]:
    """Every implementation that runs here, by how full the window is; forward and backward."""
    rates, arrays = measured_rates(suite), _attention_arrays(suite)
    cache = arrays[3].shape[1]
    whole = (*arrays, jnp.full(1, cache, jnp.int32))
    jobs = {name: (jax.jit(functools.partial(_attend, name)), whole) for name in IMPLEMENTATIONS}
    runs = compiled(jobs | {NO_LENGTH: (jax.jit(_attend_whole), whole)})
    for name, run in runs.items():
        if isinstance(run, UserError):
            yield {"case": name, "seconds": 0.0, "skipped": str(run)}
    for package in ("tokamax", "torch"):
        problem = common.absence(package)
        if problem:
            yield {"case": package, "seconds": 0.0, "skipped": problem}
    lengths = (0, cache // 3, 2 * cache // 3, cache - suite.frame_len // 2, cache)
    fills = [_Fill(suite, rates, arrays, length) for length in lengths]
    tokamax = _tokamax(fills)
    for fill in fills:
        expected = fill.exact()
        for name, run in runs.items():
            if isinstance(run, UserError) or (name == NO_LENGTH and fill.length < cache):
                continue
            call = functools.partial(run, *arrays, jnp.full(1, fill.length, jnp.int32))
            seconds = median_seconds(call, suite.repeats)
            yield fill.row(name, seconds, error=_error(call(), expected)) | memory_of(run)
        yield from _tokamax_rows(fill, tokamax, expected)
        yield from _torch_rows(fill, expected)
    yield from _gradients(suite, whole, fills[-1].work, rates)


@dataclasses.dataclass(frozen=True)
class _Fill:
    """A block's attention with the window as full as `length`.

    Attributes:
      suite: sizes.
      rates: of the machine.
      arrays: queries, keys and values of the block, and the full window's cached keys and values.
      length: valid tokens of the cache.
    """

    suite: Suite
    rates: floors.Rates
    arrays: tuple[Any, ...]
    length: int

    @property
    def keys(self) -> int:
        return self.arrays[0].shape[1] + self.length

    @property
    def work(self) -> floors.Work:
        config, queries = self.suite.transformer, self.arrays[0].shape[1]
        shape = {"heads": config.num_heads, "head_dim": config.head_dim, "itemsize": self.suite.itemsize}
        return floors.attention(batch=1, queries=queries, keys=self.keys, **shape)

    def joined(self) -> tuple[Any, Any, Any]:
        """Queries, and all keys and all values as one array each: what others take."""
        query, key, value, *cached = self.arrays
        cached_key, cached_value = (x[:, : self.length] for x in cached)
        return query, jnp.concatenate([key, cached_key], 1), jnp.concatenate([value, cached_value], 1)

    def exact(self) -> Any:
        """The result in float32."""
        wide = (x.astype(jnp.float32) for x in self.arrays)
        with jax.default_matmul_precision("highest"):
            return _exact(*wide, jnp.full(1, self.length, jnp.int32))

    def row(self, name: str, seconds: float, *, error: str) -> dict[str, Any]:
        case = f"{name} keys={self.keys}"
        return {"case": case, "error": error, **self.work.report(seconds, self.rates)}

    def skipped(self, name: str, problem: Exception) -> dict[str, Any]:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        return {"case": f"{name} keys={self.keys}", "seconds": 0.0, "skipped": reason}


def _attention_arrays(suite: Suite) -> tuple[Any, ...]:
    """Queries, keys and values of a block, and the full window's cached keys and values."""
    config = suite.transformer
    block, cache = 3 * suite.frame_len, 9 * suite.frame_len
    sizes = (block, block, block, cache, cache)
    return tuple(
        draw(i, (1, size, config.num_heads, config.head_dim), suite.dtype) for i, size in enumerate(sizes)
    )


def _attend(implementation: str, *arrays: Any) -> Any:
    query, key, value, *cached, length = arrays
    context = CachedContext(*cached, length)
    return windowed_attention(query, key, value, context=context, implementation=implementation)


_exact = jax.jit(functools.partial(_attend, "reference"))


def _attend_whole(*arrays: Any) -> Any:
    """cuDNN told nothing of a length: what a window that is always full would take."""
    query, key, value, cached_key, cached_value, _ = arrays
    keys, values = jnp.concatenate([key, cached_key], 1), jnp.concatenate([value, cached_value], 1)
    return windowed_attention(query, keys, values, implementation="cudnn")


def _error(found: Any, expected: Any) -> str:
    """The relative error, as it is printed."""
    relative = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    return f"{float(relative):.1e}"


def _gradients(
    suite: Suite, arguments: tuple[Any, ...], work: floors.Work, rates: floors.Rates
) -> Iterator[dict[str, Any]]:
    def loss(implementation: str, *arrays: Any) -> Any:
        return jnp.sum(jnp.sin(_attend(implementation, *arrays).astype(jnp.float32)))

    jobs = {
        name: (jax.jit(jax.grad(functools.partial(loss, name), argnums=range(5))), arguments)
        for name in IMPLEMENTATIONS
    }
    for name, run in compiled(jobs).items():
        if not isinstance(run, UserError):
            seconds = median_seconds(functools.partial(run, *arguments), suite.repeats)
            # Forward once, and five products backward for the two forward.
            report = work.times(3.5).report(seconds, rates)
            yield {"case": f"{name} with gradients", **memory_of(run), **report}


def _tokamax_name() -> str:
    """tokamax's own kernel where there is one, by name: its default falls back to others in silence."""
    return "mosaic" if jax.default_backend() == "gpu" else "xla"


def _tokamax(fills: Sequence[_Fill]) -> dict[str, Any]:
    """tokamax's attention for every fill, by `keys`; in place of one that fails, the exception."""
    if common.absence("tokamax"):
        return {}
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # or tokamax takes our command line for its own
    run = jax.jit(functools.partial(tokamax.dot_product_attention, implementation=_tokamax_name()))
    # Whatever does not compile, be it that the release is for another JAX, costs its own row only.
    return compiled({str(fill.keys): (run, fill.joined()) for fill in fills}, refusals=Exception)


def _tokamax_rows(fill: _Fill, programs: dict[str, Any], expected: Any) -> Iterator[dict[str, Any]]:
    run, name = programs.get(str(fill.keys)), f"tokamax {_tokamax_name()}"
    if isinstance(run, Exception):
        yield fill.skipped(name, run)
    elif run is not None:
        call = functools.partial(run, *fill.joined())
        seconds = median_seconds(call, fill.suite.repeats)
        yield fill.row(name, seconds, error=_error(call(), expected)) | memory_of(run)


def _torch_kernels(device: str) -> dict[str, Callable[[], Any]]:
    """Contexts in which PyTorch has to use one kernel: both that a GPU may have, and a CPU's default."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device == "cpu":
        return {"torch cpu": contextlib.nullcontext}
    return {
        f"torch {device} flash": functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
        f"torch {device} cudnn": functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
    }


def _torch_rows(fill: _Fill, expected: Any) -> Iterator[dict[str, Any]]:
    """PyTorch's attention on the same numbers, heads before tokens as it takes them."""
    if common.absence("torch"):
        return
    import torch

    device, dtype = common.torch_device(), getattr(torch, fill.suite.dtype)
    arrays: list[Any] = [
        torch.tensor(np.asarray(x, np.float32)).to(device, dtype).transpose(1, 2).contiguous()
        for x in fill.joined()
    ]
    call = functools.partial(torch.nn.functional.scaled_dot_product_attention, *arrays)
    for name, kernel in _torch_kernels(device).items():
        try:
            with kernel():
                seconds = median_seconds(call, fill.suite.repeats, wait=common.torch_wait)
                found = call().transpose(1, 2).float().cpu().numpy()
        except RuntimeError as refusal:  # of a kernel that does not take this precision or this device
            yield fill.skipped(name, refusal)
        else:
            yield fill.row(name, seconds, error=_error(found, expected))


def tune(suite: Suite) -> Iterator[dict[str, Any]]:
    """Tilings of the Pallas kernel on the full window; the fastest goes into `tiling.TUNED`."""
    from longlive_jax.ops.windowed_attention import pallas_mosaic_gpu
    from longlive_jax.ops.windowed_attention import tiling as tilings

    config, device = suite.transformer, jax.devices()[0]
    query, key, value, *cached = _attention_arrays(suite)
    block, cache = query.shape[1], cached[0].shape[1]
    obstacle = pallas_mosaic_gpu.obstacle(query, platform=jax.default_backend())
    if obstacle:
        yield {"case": "pallas_mosaic_gpu", "seconds": 0.0, "skipped": obstacle}
        return
    rates = measured_rates(suite)
    problem = tilings.Problem(1, config.num_heads, block, block + cache, config.head_dim)
    shape = {"batch": 1, "heads": config.num_heads, "head_dim": config.head_dim, "itemsize": suite.itemsize}
    work = floors.attention(queries=block, keys=block + cache, **shape)
    arguments = (query, key, value, *cached, jnp.full(1, cache, jnp.int32))

    def attend(tiling: tilings.Tiling, query: Any, key: Any, value: Any, *cached: Any) -> Any:
        names = ("cached_key", "cached_value", "cached_len")
        given = dict(zip(names, cached, strict=True))
        return pallas_mosaic_gpu.attend_lse(query, key, value, tiling=tiling, **given)

    found = {
        f"kv={t.block_kv} stages={t.stages} splits={t.splits}": t
        for t in tilings.candidates(problem, multiprocessors=getattr(device, "core_count", 132))
    }
    jobs = {case: (jax.jit(functools.partial(attend, t)), arguments) for case, t in found.items()}
    for case, run in compiled(jobs).items():
        seconds = median_seconds(functools.partial(run, *arguments), suite.repeats)
        entry = f"({device.device_kind!r}, {problem}): {found[case]}"
        yield {"case": case, "entry": entry, **memory_of(run), **work.report(seconds, rates)}
