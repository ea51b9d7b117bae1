"""A live session's latency: first frame, steady rate, prompt switches, the price of a recache.

    python -m benchmarks.interactive checkpoints/longlive-1.3b
    python -m benchmarks.interactive --preset toy
    python -m benchmarks.interactive --preset toy --minutes 20

With a preset the weights are random and prompts cost nothing to encode; shapes, and so times, are those of
the real model. With --minutes it runs that much video instead and reports whether memory stays flat.
"""

import argparse
import gc
import hashlib
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from longlive_jax.cli.common import setting
from longlive_jax.config import PipelineConfig, SwitchConfig, SwitchPolicy, preset
from longlive_jax.config_dict import override
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import frames_from_seconds
from longlive_jax.session import Session, turn

PROMPTS = ("a red square moving right on a dark background", "a blue ring moving down on a light background")
POLICIES: tuple[SwitchPolicy, ...] = get_args(SwitchPolicy)
CLIP_SECONDS = 10
_WARM_BLOCKS = 8  # by then the window is full and everything has been compiled
_SAMPLES = 200  # memory readings of a long run


def random_pipeline(config: PipelineConfig) -> Pipeline:
    """Random weights in the compute precision; prompts become random embeddings."""
    random, dtype = np.random.default_rng(0), jnp.dtype(config.dtype)

    def draw(spec: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 1 / np.sqrt(np.prod(spec.shape[-2:-1])) if len(spec.shape) > 1 else 0.1
        # Along the first axis piece by piece: a float32 copy of stacked layers would be the peak.
        rows = (scale * random.standard_normal(spec.shape[1:], np.float32) for _ in range(spec.shape[0]))
        return jnp.asarray(np.stack([np.asarray(row).astype(dtype) for row in rows]))

    params, vae_params = (jax.tree.map(draw, expected_tree(part, config)) for part in ("transformer", "vae"))
    return Pipeline(config, params, vae_params, lambda prompts: _embeddings(config, prompts))


def _embeddings(config: PipelineConfig, prompts: Sequence[str]) -> jax.Array:
    shape = (config.transformer.text_len, config.transformer.text_dim)
    rows = np.zeros((len(prompts), *shape), np.float32)
    for row, prompt in zip(rows, prompts, strict=True):
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
        count = min(len(prompt.split()) + 1, len(row))
        row[:count] = np.random.default_rng(seed).standard_normal((count, shape[1]), np.float32)
    return jnp.asarray(rows, jnp.dtype(config.dtype))


def latency(pipe: Pipeline, size: dict[str, int], *, blocks: int, repeats: int) -> dict[str, Any]:
    """The measurements of a session that is watched as it runs."""
    cold = first_frame(pipe, size)
    warm_up(pipe, size)
    warm = [first_frame(pipe, size) for _ in range(repeats)]
    with Session(pipe, PROMPTS[0], **size) as session:
        take(session, _WARM_BLOCKS)
        steady = [(len(frames), info.timings.interval) for _, frames, info in take(session, blocks)]
        responses: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for turn_number in range(repeats):
            for policy in POLICIES:
                session.switch(PROMPTS[(turn_number + 1) % 2], policy=policy)
                answered = [info.timings.response for _, _, info in take(session, 4)]
                responses[policy] += [seconds for seconds in answered if seconds is not None]
        snapshot = session.snapshot()
    interval = statistics.median(seconds for _, seconds in steady)
    price = {policy: switch_seconds(pipe, snapshot, policy, repeats=repeats) for policy in POLICIES}
    clip_blocks = -(-frames_from_seconds(CLIP_SECONDS, vae=pipe.config.vae, fps=pipe.config.video.fps)
                    // pipe.config.window.block_frames)  # fmt: skip
    clip = clip_blocks * interval
    return {
        "first_frame_seconds": {"cold_with_compilation": round(cold, 3), "warm": common.summary(warm)},
        "steady": {
            "block_seconds": common.summary([seconds for _, seconds in steady]),
            "frames_per_second": round(statistics.median(n / seconds for n, seconds in steady), 2),
            "blocks": blocks,
        },
        "switch_to_first_frame_seconds": {
            "what": "asked right after a block was handed out, the longest wait there is",
            **{policy: common.summary(seconds) for policy, seconds in responses.items()},
        },
        "switch_on_the_device_seconds": {policy: common.summary(s) for policy, s in price.items()},
        "recache_share_of_a_10_s_clip": round(statistics.median(price["recache"]) / clip, 4),
        "snapshot_bytes": snapshot.nbytes,
    }


def first_frame(pipe: Pipeline, size: dict[str, int]) -> float:
    """Seconds from asking for a session to its first frames, with the prompt's embedding in the cache."""
    start = time.perf_counter()
    with Session(pipe, PROMPTS[0], **size) as session:
        next(session)
        seconds = time.perf_counter() - start
    return seconds


def warm_up(pipe: Pipeline, size: dict[str, int]) -> None:
    """Compiles everything a session may ask for, once the window is full."""
    with Session(pipe, PROMPTS[0], **size) as session:
        take(session, _WARM_BLOCKS)
        for policy in POLICIES:
            for _ in range(2):  # a recache right after a flush has a size of its own
                session.switch(PROMPTS[1], policy=policy)
                take(session, 4)


def switch_seconds(pipe: Pipeline, snapshot: Any, policy: SwitchPolicy, *, repeats: int) -> list[float]:
    """Seconds of the switch alone, device idle before and after."""
    track = snapshot.moment.track
    seconds = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(turn.on_device(snapshot.moment.stream))
        start = time.perf_counter()
        jax.block_until_ready(pipe.switch(state, [track], {0: SwitchConfig(policy)}))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def take(session: Session, count: int) -> list[Any]:
    return [next(session) for _ in range(count)]


def flatness(pipe: Pipeline, size: dict[str, int], *, minutes: float) -> dict[str, Any]:
    """Memory of a session that runs for so much video, with a switch now and then."""
    frames = frames_from_seconds(60 * minutes, vae=pipe.config.vae, fps=pipe.config.video.fps)
    blocks = -(-frames // pipe.config.window.block_frames)
    warm_up(pipe, size)
    gc.collect()
    every, readings, start = max(blocks // _SAMPLES, 1), [], time.perf_counter()
    with Session(pipe, PROMPTS[0], **size, blocks=blocks) as session:
        for _, _, info in session:
            if info.block % 25 == 20:
                session.switch(PROMPTS[info.block % 2], policy=POLICIES[info.block // 25 % len(POLICIES)])
            if info.block % every == 0:
                readings.append((process_bytes(), device_bytes()))
    tenth = len(readings) // 10
    host, device = ([reading[i] for reading in readings] for i in range(2))
    return {
        "video_minutes": minutes,
        "blocks": blocks,
        "seconds": round(time.perf_counter() - start, 1),
        "process_bytes": {"after_a_tenth": max(host[: tenth + 1]), "most_after_that": max(host[tenth:])},
        "device_bytes": {"after_a_tenth": max(device[: tenth + 1]), "most_after_that": max(device[tenth:])},
        "growth_percent": {
            name: round(100 * (max(values[tenth:]) / max(values[: tenth + 1]) - 1), 2)
            for name, values in (("process", host), ("device", device))
        },
    }


def process_bytes() -> int:
    """Resident memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int:
    """Memory in use on the device, as its allocator says, or the arrays that are alive."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else sum(array.nbytes for array in jax.live_arrays())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory, or a bundled one's name")
    parser.add_argument("--preset", help="random weights of this preset instead")
    parser.add_argument(
        "--set", dest="settings", type=setting, action="append", default=[], help="NAME=VALUE"
    )
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--blocks", type=int, default=20, help="blocks the steady rate is taken over")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="instead: memory over so much video")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.preset is None):
        parser.error("give a checkpoint or --preset")
    settings = {"window.rope": "relative"} | dict(arguments.settings)
    if arguments.preset:
        name, pipe = arguments.preset, random_pipeline(override(preset(arguments.preset), settings))
    else:
        pipe = Pipeline.load(arguments.checkpoint, overrides=settings)
        name = pipe.config.name
    video = pipe.config.video
    size = {"height": arguments.height or video.height, "width": arguments.width or video.width}
    if arguments.minutes:
        kind, measured = "interactive_memory", flatness(pipe, size, minutes=arguments.minutes)
    else:
        kind = "interactive"
        measured = latency(pipe, size, blocks=arguments.blocks, repeats=arguments.repeats)
    what = {"model": name, "weights": "random" if arguments.preset else "checkpoint", **size}
    result = {**what, "dtype": pipe.config.dtype, "settings": settings, **measured}
    if arguments.no_save:
        print(result)
    else:
        common.save(f"{kind}_{name}", result)


if __name__ == "__main__":
    main()
