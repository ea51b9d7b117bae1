"""Pairs of starts of `longlive generate`: with an empty cache folder, and with what the first left there.

    python -m benchmarks.start_up --preset toy

Each start is a process: Python, JAX, the weights, compilation or its result from the disk, and two blocks
written as PNG files. The folder keeps compiled programs, shapes and the prompt's embedding. The first frame
is there when its file is: the command's own record begins after the imports and does not time it. Weights are
random, as they do not matter here. On a machine with other work the processor time says more than the clock.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import common
from longlive_jax.video import FRAME_NAME

PAIRS = 5
FRAMES = 6
"""Latent frames: two blocks, as the decoder's program of all blocks but the first is part of a start."""

TIMES = ("seconds", "first_frame_seconds", "processor_seconds")
_POLL_SECONDS = 0.01


def random_checkpoint(preset_name: str, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint of a preset with random weights."""
    import jax
    import numpy as np

    from longlive_jax import checkpoint
    from longlive_jax.config import preset
    from longlive_jax.convert.shapes import expected_tree
    from longlive_jax.models.tokenizer import train_word_tokenizer

    config, random = preset(preset_name), np.random.default_rng(0)

    def draw(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = np.prod(spec.shape[:-1]) if len(spec.shape) > 1 else 1
        return (random.standard_normal(spec.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

    words = ["a red circle moves right", "a blue square stays"]
    size = config.text_encoder.vocab_size
    tokenizer = train_word_tokenizer(words, vocab_size=size, path=folder / "tokenizer.json")
    with checkpoint.create(folder / preset_name, config, source={"made_for": "a benchmark"}) as out:
        for part in ("transformer", "text_encoder", "vae"):
            out.add_tree(part, jax.tree.map(draw, expected_tree(part, config)))
        out.add_tokenizer(tokenizer)
    return folder / preset_name


def start(checkpoint: pathlib.Path, folder: pathlib.Path, name: str) -> dict[str, float]:
    """One start.

    Args:
      checkpoint: what is started.
      folder: of the cache and the frames.
      name: of the folder of frames in it.

    Returns:
      `seconds` of the process, `first_frame_seconds` until its first frame's file is there,
      `processor_seconds`, and the most memory it held, `process_peak_mib`.
    """
    command = [sys.executable, "-m", "longlive_jax.cli.main", "generate", "--checkpoint", str(checkpoint)]
    command += ["--prompt", "a red circle moves right", "--frames", str(FRAMES), "--quiet"]
    command += ["--out", f"{folder / name}/"]
    variables = os.environ | {"LONGLIVE_CACHE": str(folder / "cache")}
    first_frame = peak = None
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=errors)
        while True:
            peak = common.process_peak_mib(process.pid) or peak
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - begin
            # Beside the folder of that name until all frames are in it.
            if first_frame is None and any(folder.glob(f"{name}*/{FRAME_NAME.format(0)}")):
                first_frame = seconds
            if ended:
                break
            time.sleep(_POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or first_frame is None or peak is None:
            errors.seek(0)
            raise RuntimeError(f"longlive generate failed ({process.returncode}): {errors.read()}")
    return {
        "seconds": round(seconds, 2),
        "first_frame_seconds": round(first_frame, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "process_peak_mib": peak,
    }


def starts(preset_name: str, *, pairs: int) -> Iterator[dict[str, dict[str, float]]]:
    """Pairs of a `first` start with an empty cache folder and a `second` one, and `first_over_second`."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint = random_checkpoint(preset_name, pathlib.Path(name))
        # Not the first thing to read Python's and JAX's files from the disk.
        subprocess.run([sys.executable, "-c", "import jax.numpy, flax, PIL"], check=True)
        for _ in range(pairs):
            with tempfile.TemporaryDirectory() as place:
                pair = {case: start(checkpoint, pathlib.Path(place), case) for case in ("first", "second")}
            first, second = pair.values()
            yield pair | {"first_over_second": {time: round(first[time] / second[time], 2) for time in TIMES}}


def medians(pairs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The medians of `starts`, of every number by itself; the ratios are taken pair by pair before."""
    return {
        case: {key: round(statistics.median(pair[case][key] for pair in pairs), 2) for key in numbers}
        for case, numbers in pairs[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    if arguments.pairs < 1:
        parser.error(f"--pairs={arguments.pairs} must be positive")
    pairs = []
    for pair in starts(arguments.preset, pairs=arguments.pairs):
        print(pair, file=sys.stderr, flush=True)
        pairs.append(pair)
    result: dict[str, Any] = {
        "what": f"longlive generate, preset {arguments.preset} with random weights, {FRAMES} latent frames, "
        "whole process and first frame; medians of the pairs",
        **medians(pairs),
        "pairs": pairs,
    }
    if arguments.no_save:
        print(result)
    else:
        common.save("start_up", result)


if __name__ == "__main__":
    main()
