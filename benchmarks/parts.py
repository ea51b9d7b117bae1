"""The parts of `benchmarks.run`; each prints one line of JSON.

python -m benchmarks.parts attention --suite tiny
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import floors
from longlive_jax.config import (
    MIN_VAE_TILE,
    TAEW2_1,
    WAN_1_3B,
    WAN_VAE,
    DType,
    PipelineConfig,
    SamplerConfig,
    TransformerConfig,
    VAEConfig,
    WindowConfig,
    preset,
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Sizes and repeats.

    Attributes:
      transformer: the model of the block step; attention has its heads.
      vae: the decoder.
      size: latent rows and columns.
      dtype: of everything.
      repeats: timed calls, of which the median counts.
      windows: window sizes in latent frames, with the released sink.
      sinks: sinks, with the released window.
      matmul: side of the matrix product that measures the machine.
      start_up: preset of the two starts.
    """

    transformer: TransformerConfig
    vae: VAEConfig
    size: tuple[int, int]
    dtype: DType
    repeats: int
    windows: tuple[int, ...] = (6, 9, 12, 15, 18, 21, 24, 27)
    sinks: tuple[int, ...] = (0, 3, 6)
    matmul: int = 1024
    start_up: str = "toy"

    @property
    def frame_len(self) -> int:
        return self.transformer.frame_len(*self.size)

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


TINY: PipelineConfig = preset("tiny")
SUITES = {
    "gpu": Suite(WAN_1_3B, WAN_VAE, (60, 104), "bfloat16", repeats=20, matmul=8192),
    "cpu": Suite(
        TransformerConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=512, text_len=64),
        dataclasses.replace(WAN_VAE, dim=32), (16, 24), "float32", repeats=5,
    ),
    "tiny": Suite(
        TINY.transformer, TINY.vae, (4, 6), "float32", repeats=2, windows=(6, 12), sinks=(0, 3), matmul=256,
        start_up="tiny",
    ),
}  # fmt: skip


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time until the results are there, after one untimed call."""
    import jax

    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def draw(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Random numbers; zeros would be faster than anything real."""
    import jax

    return jax.random.normal(jax.random.key(seed), shape, dtype)


def measured_rates(suite: Suite) -> floors.Rates:
    """A large matrix product and a large copy on the default device."""
    import jax
    import jax.numpy as jnp

    n = suite.matmul
    a, b = (draw(i, (n, n), suite.dtype) for i in range(2))
    product = median_seconds(functools.partial(jax.jit(jnp.matmul), a, b), suite.repeats)
    long = draw(0, (32 * n * n,), suite.dtype)
    copy = median_seconds(functools.partial(jax.jit(lambda x: x + 1), long), suite.repeats)
    return floors.Rates(2 * n**3 / product, 2 * long.nbytes / copy)


# --- attention ------------------------------------------------------------------------------------


def attention(suite: Suite) -> Iterator[dict[str, Any]]:
    """Every implementation that runs here, by how full the window is; forward and backward."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.errors import UserError
    from longlive_jax.ops.windowed_attention import CachedContext, windowed_attention

    rates, config = measured_rates(suite), suite.transformer
    block, cache = 3 * suite.frame_len, 9 * suite.frame_len
    query, key, value = (
        draw(i, (1, block, config.num_heads, config.head_dim), suite.dtype) for i in range(3)
    )
    cached = [draw(i, (1, cache, config.num_heads, config.head_dim), suite.dtype) for i in (3, 4)]

    def call(implementation: str, *arrays: Any) -> Any:
        query, key, value, *cached, length = arrays
        context = CachedContext(*cached, length)
        return windowed_attention(query, key, value, context=context, implementation=implementation)

    wide = [x.astype(jnp.float32) for x in (query, key, value, *cached)]
    for length in (0, cache // 3, 2 * cache // 3, cache - suite.frame_len // 2, cache):
        valid = jnp.full(1, length, jnp.int32)
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(functools.partial(call, "reference"))(*wide, valid)
        work = floors.attention(
            batch=1, heads=config.num_heads, queries=block, keys=block + length,
            head_dim=config.head_dim, itemsize=suite.itemsize,
        )  # fmt: skip
        for implementation in ("reference", "cudnn", "pallas_mosaic_gpu"):
            run = jax.jit(functools.partial(call, implementation))
            arguments = (query, key, value, *cached, valid)
            try:
                error = jnp.linalg.norm(run(*arguments).astype(jnp.float32) - expected)
            except UserError as refusal:
                if length == 0:
                    yield {"case": implementation, "seconds": 0.0, "skipped": str(refusal)}
                continue
            seconds = median_seconds(functools.partial(run, *arguments), suite.repeats)
            relative = float(error / jnp.linalg.norm(expected))
            case = f"{implementation} keys={block + length}"
            yield {"case": case, "error": f"{relative:.1e}", **work.report(seconds, rates)}
        yield from _torch_attention(suite, block, block + length, work, rates)
    yield from _gradients(suite, call, (query, key, value, *cached, valid), work, rates)


def _gradients(
    suite: Suite, call: Callable[..., Any], arguments: tuple[Any, ...], work: floors.Work, rates: floors.Rates
) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from longlive_jax.errors import UserError

    def loss(implementation: str, *arrays: Any) -> Any:
        return jnp.sum(jnp.sin(call(implementation, *arrays).astype(jnp.float32)))

    for implementation in ("reference", "cudnn", "pallas_mosaic_gpu"):
        run = jax.jit(jax.grad(functools.partial(loss, implementation), argnums=range(5)))
        try:
            seconds = median_seconds(functools.partial(run, *arguments), suite.repeats)
        except UserError:
            continue
        # Forward once, and five products backward for the two forward.
        yield {"case": f"{implementation} with gradients", **work.times(3).report(seconds, rates)}


def _torch_attention(
    suite: Suite, queries: int, keys: int, work: floors.Work, rates: floors.Rates
) -> Iterator[dict[str, Any]]:
    """PyTorch's own attention on the same sizes, where it is installed."""
    try:
        import torch
    except ImportError:
        return
    config, device = suite.transformer, "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, suite.dtype)
    shape = (1, config.num_heads, queries, config.head_dim)
    query = torch.randn(shape, dtype=dtype, device=device)
    key, value = (torch.randn((1, shape[1], keys, shape[3]), dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(suite.repeats + 1):
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    yield {
        "case": f"torch {device} keys={keys}", **work.report(statistics.median(seconds[1:]), rates)
    }  # fmt: skip


def tune(suite: Suite) -> Iterator[dict[str, Any]]:
    """Tilings of the Pallas kernel on the full window; the fastest goes into `tiling.TUNED`."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.ops.windowed_attention import pallas_mosaic_gpu
    from longlive_jax.ops.windowed_attention import tiling as tilings

    config, device = suite.transformer, jax.devices()[0]
    block, cache = 3 * suite.frame_len, 9 * suite.frame_len
    query, key, value = (
        draw(i, (1, block, config.num_heads, config.head_dim), suite.dtype) for i in range(3)
    )
    cached = [draw(i, (1, cache, config.num_heads, config.head_dim), suite.dtype) for i in (3, 4)]
    obstacle = pallas_mosaic_gpu.obstacle(query, platform=jax.default_backend())
    if obstacle:
        yield {"case": "pallas_mosaic_gpu", "seconds": 0.0, "skipped": obstacle}
        return
    rates = measured_rates(suite)
    problem = tilings.Problem(1, config.num_heads, block, block + cache, config.head_dim)
    shape = {"batch": 1, "heads": config.num_heads, "head_dim": config.head_dim, "itemsize": suite.itemsize}
    work = floors.attention(queries=block, keys=block + cache, **shape)
    length = {"cached_key": cached[0], "cached_value": cached[1], "cached_len": jnp.full(1, cache, jnp.int32)}
    for tiling in tilings.candidates(problem, multiprocessors=getattr(device, "core_count", 132)):
        run = jax.jit(functools.partial(pallas_mosaic_gpu.attend_lse, tiling=tiling))
        seconds = median_seconds(lambda run=run: run(query, key, value, **length), suite.repeats)
        case = f"kv={tiling.block_kv} stages={tiling.stages} splits={tiling.splits}"
        entry = f"({device.device_kind!r}, {problem}): {tiling}"
        yield {"case": case, "entry": entry, **work.report(seconds, rates)}


# --- the block step, the decoder, both ----------------------------------------------------------------


def _block_rows(suite: Suite, window: WindowConfig, rates: floors.Rates) -> dict[str, Any]:
    import jax

    from longlive_jax.audit import audit
    from longlive_jax.inference import rollout

    generator, params, state = started(suite, window)
    program = rollout.step.lower(generator, params, state).compile()
    found = audit(program, large=state.cache.key.size)
    for _ in range(-(-window.window_frames // window.block_frames)):  # until the window is full
        state, _ = rollout.step(generator, params, state)
    seconds = []
    for _ in range(suite.repeats):
        start = time.perf_counter()
        state, latents = rollout.step(generator, params, state)
        jax.block_until_ready(latents)
        seconds.append(time.perf_counter() - start)
    work = floors.block_step(
        suite.transformer, window, frame_len=suite.frame_len,
        passes=len(generator.sampler.steps) + 1, itemsize=suite.itemsize,
    )  # fmt: skip
    report = work.report(statistics.median(seconds), rates)
    return {
        "case": f"window={window.window_frames} sink={window.sink_frames}",
        "fps": round(suite.vae.temporal_stride * window.block_frames / report["seconds"], 2),
        "copies_as_large_as_the_cache": len(found.copies),
        "host_transfers": len(found.host_transfers),
        "temporary_mib": round(found.temporary_bytes / 2**20, 1),
        "peak_mib": peak_mib(),
        **report,
    }


def started(suite: Suite, window: WindowConfig) -> tuple[Any, Any, Any]:
    """A generator, random weights and the first state."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from longlive_jax.inference import rollout
    from longlive_jax.models.transformer import Transformer, init_params

    model = Transformer(suite.transformer, dtype=jnp.dtype(suite.dtype), param_dtype=jnp.dtype(suite.dtype))
    generator = rollout.Generator(model, window, SamplerConfig())
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    text = draw(1, (1, suite.transformer.text_len, suite.transformer.text_dim), suite.dtype)
    seeds = np.zeros(1, np.uint32)
    return generator, params, rollout.init(generator, params, text, seeds, latent_size=suite.size)


def peak_mib() -> float | None:
    """Most device memory so far, where the device says so."""
    import jax

    statistics_ = jax.local_devices()[0].memory_stats() or {}
    peak = statistics_.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 2**20, 1)


def block_step(suite: Suite) -> Iterator[dict[str, Any]]:
    """Four denoising passes and the clean one, by window and by sink."""
    rates = measured_rates(suite)
    windows = {WindowConfig(size, min(3, size - 3), 3) for size in suite.windows}
    windows |= {WindowConfig(12, sink, 3) for sink in suite.sinks}
    for window in sorted(windows, key=lambda w: (w.window_frames, w.sink_frames)):
        yield _block_rows(suite, window, rates)


def length(suite: Suite) -> Iterator[dict[str, Any]]:
    """The block step after 10, 60 and 240 seconds of video: it should not grow."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.inference import rollout

    window, rates = WindowConfig(12, 3, 3), measured_rates(suite)
    generator, params, state = started(suite, window)
    for _ in range(4):
        state, _ = rollout.step(generator, params, state)
    passes = len(generator.sampler.steps) + 1
    sizes = {"frame_len": suite.frame_len, "passes": passes, "itemsize": suite.itemsize}
    work = floors.block_step(suite.transformer, window, **sizes)
    for video_seconds in (10, 60, 240):
        frame = suite.vae.latent_frames(16 * video_seconds) // 3 * 3
        moved = dataclasses.replace(state, frame=jnp.int32(frame))
        # The cache of a video of that length: full, and its newest frame just before.
        full = dataclasses.replace(moved.cache, end=jnp.full(1, frame, jnp.int32))
        assert int(full.length[0]) == full.slots
        moved = jax.tree.map(jnp.copy, dataclasses.replace(moved, cache=full))
        seconds = []
        for _ in range(suite.repeats):
            start = time.perf_counter()
            moved, latents = rollout.step(generator, params, moved)
            jax.block_until_ready(latents)
            seconds.append(time.perf_counter() - start)
        yield {"case": f"after {video_seconds} s", **work.report(statistics.median(seconds), rates)}


def vae(suite: Suite) -> Iterator[dict[str, Any]]:
    """Decoding one block of a running video to pixels: Wan's VAE, the same in tiles, and the small ones."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.models.vae_families import init_params, make

    rates = measured_rates(suite)
    latents = draw(0, (1, 3, *suite.size, suite.vae.z_dim), "float32")
    tile = max(MIN_VAE_TILE, suite.vae.spatial_stride * min(suite.size) // 2)
    # As wide beside the suite's VAE as the released ones are beside Wan's.
    light = dataclasses.replace(suite.vae, dim=suite.vae.dim // 4)
    taehv = dataclasses.replace(TAEW2_1, dim=max(TAEW2_1.dim * suite.vae.dim // WAN_VAE.dim, 1))
    cases = (
        ("block", suite.vae, 0),
        (f"block, tiles of {tile}", suite.vae, tile),
        ("block, LightVAE", light, 0),
        ("block, TAEHV", taehv, 0),
    )
    for case, config, tile in cases:
        model = make(config, dtype=jnp.dtype(suite.dtype), tile=tile)
        params = jax.tree.map(lambda x: x.astype(suite.dtype), init_params(model, jax.random.key(0)))
        decode = functools.partial(model.apply, method="decode_step")
        state = model.init_decode_state(1, height=suite.size[0], width=suite.size[1])
        _, state = jax.jit(decode)({"params": params}, state, latents)
        arguments = ({"params": params}, state, latents)
        # The work of whole frames: what tiles compute twice is not work that had to be done.
        whole = functools.partial(make(config, dtype=jnp.dtype(suite.dtype)).apply, method="decode_step")
        work, run = floors.traced(whole, *arguments), jax.jit(decode).lower(*arguments).compile()
        seconds = median_seconds(functools.partial(run, *arguments), suite.repeats)
        frames = 3 * config.temporal_stride
        yield {
            "case": case,
            "fps": round(frames / seconds, 2),
            "temporary_mib": round(run.memory_analysis().temp_size_in_bytes / 2**20, 1),
            "peak_mib": peak_mib(),
            **work.report(seconds, rates),
        }


def end_to_end(suite: Suite) -> Iterator[dict[str, Any]]:
    """Blocks generated and decoded as a stream, the next under way while the last one is fetched."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from longlive_jax.inference import rollout
    from longlive_jax.inference.pipeline import one_ahead
    from longlive_jax.models.vae import WanVAE, init_params

    start, window = time.perf_counter(), WindowConfig(12, 3, 3)
    generator, params, state = started(suite, window)
    model = WanVAE(suite.vae, dtype=jnp.dtype(suite.dtype))
    vae_params = jax.tree.map(lambda x: x.astype(suite.dtype), init_params(model, jax.random.key(0)))
    decode = jax.jit(functools.partial(model.apply, method="decode_step"), donate_argnums=1)
    decoder = model.init_decode_state(1, height=suite.size[0], width=suite.size[1])

    def blocks() -> Iterator[Any]:
        nonlocal state, decoder
        for _ in range(suite.repeats + 5):
            state, latents = rollout.step(generator, params, state)
            pixels, decoder = decode({"params": vae_params}, decoder, latents)
            yield jnp.round((pixels + 1) * 127.5).astype(jnp.uint8)

    times = []
    for pixels in one_ahead(blocks()):
        np.asarray(pixels)
        times.append(time.perf_counter())
    yield {"case": "first frame, weights drawn and compiled", "seconds": times[0] - start}
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times[4:]))
    frames = 3 * suite.vae.temporal_stride
    yield {"case": "block", "seconds": seconds, "fps": round(frames / seconds, 2), "peak_mib": peak_mib()}


def start_up(suite: Suite) -> Iterator[dict[str, Any]]:
    """Two starts of `longlive generate`, to the end of the first block."""
    from benchmarks.start_up import starts

    first, second = starts(suite.start_up)
    for name, found in (("first start", first), ("second start", second)):
        yield {"case": name, **found}


PARTS: dict[str, Callable[[Suite], Iterator[dict[str, Any]]]] = {
    "attention": attention,
    "tune": tune,
    "block_step": block_step,
    "length": length,
    "vae": vae,
    "end_to_end": end_to_end,
    "start_up": start_up,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    arguments = parser.parse_args()
    rows = list(PARTS[arguments.part](SUITES[arguments.suite]))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
