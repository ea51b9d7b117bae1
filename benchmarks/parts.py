"""The parts of `benchmarks.run`; each prints a line of JSON for every case, when it is measured.

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

from benchmarks import common, floors
from benchmarks.attention import IMPLEMENTATIONS, attention, tune
from benchmarks.peers import peers
from benchmarks.suites import SUITES, Suite, compiled, draw, measured_rates, median_seconds, memory_of
from longlive_jax.config import (
    MIN_VAE_TILE,
    TAEW2_1,
    WAN_VAE,
    SamplerConfig,
    VAEConfig,
    WindowConfig,
)


@dataclasses.dataclass
class _Stepping:
    """A rollout that is stepped by a compiled program."""

    window: WindowConfig
    generator: Any
    params: Any
    state: Any

    @property
    def program(self) -> tuple[Any, tuple[Any, ...]]:
        """What `compiled` takes."""
        from longlive_jax.inference import rollout

        return rollout.step, (self.generator, self.params, self.state)

    def work(self, suite: Suite) -> floors.Work:
        """Of a block, once the window is full."""
        return floors.block_step(
            suite.transformer, self.window, frame_len=suite.frame_len,
            passes=len(self.generator.sampler.steps) + 1, itemsize=suite.itemsize,
        )  # fmt: skip

    def measured(self, suite: Suite, program: Any, rates: floors.Rates) -> dict[str, Any]:
        """Steps until the window is full, then with the clock running."""
        import jax

        from longlive_jax.audit import audit

        window, state = self.window, self.state
        found = audit(program, large=state.cache.key.size)
        for _ in range(-(-window.window_frames // window.block_frames)):
            state, _ = program(self.params, state)
        seconds = []
        for _ in range(suite.repeats):
            start = time.perf_counter()
            state, latents = program(self.params, state)
            jax.block_until_ready(latents)
            seconds.append(time.perf_counter() - start)
        report = self.work(suite).report(statistics.median(seconds), rates)
        return {
            "fps": round(suite.vae.temporal_stride * window.block_frames / report["seconds"], 2),
            "copies_as_large_as_the_cache": len(found.copies),
            "host_transfers": len(found.host_transfers),
            **memory_of(program),
            **report,
        }


def started(suite: Suite, window: WindowConfig, **settings: Any) -> tuple[Any, Any, Any]:
    """A generator, random weights and the first state; `settings` are the transformer's."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.models.transformer import Transformer, init_params

    dtype = jnp.dtype(suite.dtype)
    model = Transformer(suite.transformer, dtype=dtype, param_dtype=dtype, **settings)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return _generator(model, window), params, _first_state(suite, _generator(model, window), params)


def _generator(model: Any, window: WindowConfig) -> Any:
    from longlive_jax.inference import rollout

    return rollout.Generator(model, window, SamplerConfig())


def _first_state(suite: Suite, generator: Any, params: Any) -> Any:
    import numpy as np

    from longlive_jax.inference import rollout

    text = draw(1, (1, suite.transformer.text_len, suite.transformer.text_dim), suite.dtype)
    return rollout.init(generator, params, text, np.zeros(1, np.uint32), latent_size=suite.size)


def block_step(suite: Suite) -> Iterator[dict[str, Any]]:
    """Four denoising passes and the clean one in the released window, by implementation of the attention.

    "auto" may be a mixture: the cache and the text are two calls.
    """
    from longlive_jax.errors import UserError

    rates, window = measured_rates(suite), WindowConfig(12, 3, 3)
    generator, params, _ = started(suite, window)
    steppings = {}
    for name in (*IMPLEMENTATIONS, "auto"):
        model = dataclasses.replace(generator.transformer, attention=name)
        other = _generator(model, window)
        steppings[name] = _Stepping(window, other, params, _first_state(suite, generator, params))
    programs = compiled({n: s.program for n, s in steppings.items()})
    refused = {name: program for name, program in programs.items() if isinstance(program, UserError)}
    if len(refused) < len(IMPLEMENTATIONS) - 1:  # the oracle takes seconds a block where there are kernels
        refused["reference"] = UserError("there are faster ones here")
    for name, program in programs.items():
        if name in refused:
            yield {"case": name, "seconds": 0.0, "skipped": str(refused[name])}
        else:
            yield {"case": name, **steppings[name].measured(suite, program, rates)}


def windows(suite: Suite) -> Iterator[dict[str, Any]]:
    """The block step by window and by sink."""
    rates = measured_rates(suite)
    sizes = {WindowConfig(size, min(3, size - 3), 3) for size in suite.windows}
    sizes |= {WindowConfig(12, sink, 3) for sink in suite.sinks}
    generator, params, _ = started(suite, WindowConfig(12, 3, 3))
    steppings = {}
    for window in sorted(sizes, key=lambda w: (w.window_frames, w.sink_frames)):
        other = _generator(generator.transformer, window)
        case = f"window={window.window_frames} sink={window.sink_frames}"
        steppings[case] = _Stepping(window, other, params, _first_state(suite, other, params))
    for case, program in compiled({n: s.program for n, s in steppings.items()}).items():
        yield {"case": case, **steppings.pop(case).measured(suite, program, rates)}


def length(suite: Suite) -> Iterator[dict[str, Any]]:
    """The block step after 10, 60 and 240 seconds of video: it should not grow.

    The video before is not generated: the state of one with a full window is told that it is so far on.
    """
    import jax
    import jax.numpy as jnp

    window, rates = WindowConfig(12, 3, 3), measured_rates(suite)
    generator, params, state = started(suite, window)
    stepping = _Stepping(window, generator, params, state)
    program, work = compiled({"step": stepping.program})["step"], stepping.work(suite)
    for _ in range(4):
        state, _ = program(params, state)
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
            moved, latents = program(params, moved)
            jax.block_until_ready(latents)
            seconds.append(time.perf_counter() - start)
        report = work.report(statistics.median(seconds), rates)
        yield {"case": f"after {video_seconds} s", **memory_of(program), **report}


def _decoders(suite: Suite) -> dict[str, VAEConfig]:
    """The suite's VAE, and small ones as wide beside it as the released ones are beside Wan's."""
    return {
        "Wan VAE": suite.vae,
        "LightVAE": dataclasses.replace(suite.vae, dim=suite.vae.dim // 4),
        "TAEHV": dataclasses.replace(TAEW2_1, dim=max(TAEW2_1.dim * suite.vae.dim // WAN_VAE.dim, 1)),
    }


class _Decoding:
    """A decoder in the middle of a video, with random weights."""

    def __init__(self, suite: Suite, config: VAEConfig, *, tile: int = 0) -> None:
        import jax
        import jax.numpy as jnp

        from longlive_jax.models.vae_families import init_params, make

        self.config = config
        model = make(config, dtype=jnp.dtype(suite.dtype), tile=tile)
        params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
        self.params = {"params": jax.tree.map(lambda x: x.astype(suite.dtype), params)}
        self.latents = draw(0, (1, 3, *suite.size, config.z_dim), "float32")
        self.step = functools.partial(model.apply, method="decode_step")
        begun = model.init_decode_state(1, height=suite.size[0], width=suite.size[1])
        # As after the first block: a video that has begun has other shapes than one that has not.
        shapes = jax.eval_shape(self.step, self.params, begun, self.latents)[1]
        self.state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @property
    def program(self) -> tuple[Any, tuple[Any, ...]]:
        """What `compiled` takes."""
        import jax

        return jax.jit(self.step, donate_argnums=1), (self.params, self.state, self.latents)

    @property
    def work(self) -> floors.Work:
        """Of a block; what tiles compute twice is work as well."""
        return floors.traced(self.step, self.params, self.state, self.latents)

    def advance(self, program: Any) -> Any:
        """The next block's pixels, by the compiled program."""
        pixels, self.state = program(self.params, self.state, self.latents)
        return pixels


def vae(suite: Suite) -> Iterator[dict[str, Any]]:
    """Decoding one block of a running video to pixels: Wan's VAE, the same in tiles, and the small ones."""
    rates = measured_rates(suite)
    tile = max(MIN_VAE_TILE, suite.vae.spatial_stride * min(suite.size) // 2)
    found = {name: _Decoding(suite, config) for name, config in _decoders(suite).items()}
    found[f"Wan VAE, tiles of {tile}"] = _Decoding(suite, suite.vae, tile=tile)
    for case, run in compiled({name: decoding.program for name, decoding in found.items()}).items():
        decoding = found[case]
        # The work of whole frames: what tiles compute twice is not work that had to be done.
        work = found["Wan VAE" if "tiles" in case else case].work
        median = median_seconds(functools.partial(decoding.advance, run), suite.repeats)
        yield {
            "case": case,
            "fps": round(3 * decoding.config.temporal_stride / median, 2),
            **memory_of(run),
            **work.report(median, rates),
        }


def end_to_end(suite: Suite) -> Iterator[dict[str, Any]]:
    """Blocks generated and decoded as a stream, the next under way while the last one is fetched.

    The floor is that of the step and the decoder together. Drawing weights and compiling has none.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from longlive_jax.inference.pipeline import one_ahead

    rates, start = measured_rates(suite), time.perf_counter()
    generator, params, state = started(suite, WindowConfig(12, 3, 3))
    decoders = {name: _Decoding(suite, config) for name, config in _decoders(suite).items()}
    jobs = {name: decoding.program for name, decoding in decoders.items()}
    stepping = _Stepping(generator.window, generator, params, state)
    programs = compiled({"step": stepping.program, **jobs})
    works = {name: stepping.work(suite) + decoding.work for name, decoding in decoders.items()}
    to_bytes = jax.jit(lambda pixels: jnp.round((pixels + 1) * 127.5).astype(jnp.uint8))
    yield {"case": "weights drawn, programs compiled", "seconds": time.perf_counter() - start}

    def blocks(decoding: _Decoding, decode: Any) -> Iterator[Any]:
        nonlocal state
        decoder = decoding.state
        for _ in range(suite.repeats + 5):
            state, latents = programs["step"](params, state)
            pixels, decoder = decode(decoding.params, decoder, latents)
            yield to_bytes(pixels)

    for name, decoding in decoders.items():
        times = [time.perf_counter()]
        for pixels in one_ahead(blocks(decoding, programs[name])):
            np.asarray(pixels)
            times.append(time.perf_counter())
        seconds = statistics.median(b - a for a, b in itertools.pairwise(times[5:]))
        fps = round(3 * decoding.config.temporal_stride / seconds, 2)
        memory = memory_of(programs["step"], programs[name])
        yield {"case": name, "fps": fps, **memory, **works[name].report(seconds, rates)}


def start_up(suite: Suite) -> Iterator[dict[str, Any]]:
    """Starts of `longlive generate` without and with compiled programs on the disk, medians of pairs.

    There is no floor: a start is imports, tracing, compiling and reading files, and no count of operations
    says how long these have to take.
    """
    from benchmarks.start_up import PAIRS, medians, starts

    pairs = list(starts(suite.start_up, pairs=min(suite.repeats, PAIRS)))
    found = medians(pairs)
    yield {"case": "first start", "pairs": len(pairs), **found["first"]}
    ratio = found["first_over_second"]["seconds"]
    yield {"case": "second start", "pairs": len(pairs), "first_over_second": ratio, **found["second"]}


PARTS: dict[str, Callable[[Suite], Iterator[dict[str, Any]]]] = {
    "attention": attention,
    "tune": tune,
    "peers": peers,
    "block_step": block_step,
    "windows": windows,
    "length": length,
    "vae": vae,
    "end_to_end": end_to_end,
    "start_up": start_up,
}


def _process_memory() -> dict[str, float]:
    """High-water marks of this process, that is of the whole part: its own, and the device's if it says."""
    import jax

    peaks = {"process_peak_mib": common.process_peak_mib()}
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    peaks["device_peak_mib"] = None if device is None else round(device / 2**20, 1)
    return {name: peak for name, peak in peaks.items() if peak is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    parser.add_argument("--repeats", type=int, help="timed calls (default: the suite's)")
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    suite = dataclasses.replace(suite, repeats=arguments.repeats or suite.repeats)
    for row in PARTS[arguments.part](suite):
        print(json.dumps(row), flush=True)
    print(json.dumps({"process": _process_memory()}), flush=True)


if __name__ == "__main__":
    main()
