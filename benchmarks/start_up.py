"""Two starts of `longlive generate` with a folder of compiled programs that is empty at first.

    python -m benchmarks.start_up --preset toy

Each start is a process: Python, JAX, the weights, compilation or its result from the disk, and one block
written as a video. Weights are random, as they do not matter here. On a machine with other work the
processor time says more than the clock.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import common


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


def start(checkpoint: pathlib.Path, folder: pathlib.Path, out: str) -> dict[str, float]:
    """Seconds of one start, by the clock and of the processors."""
    command = [sys.executable, "-m", "longlive_jax.cli.main", "generate", "--checkpoint", str(checkpoint)]
    command += [
        "--prompt",
        "a red circle moves right",
        "--frames",
        "3",
        "--quiet",
        "--out",
        str(folder / out),
    ]
    variables = os.environ | {"LONGLIVE_CACHE": str(folder / "cache")}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=variables, check=True, capture_output=True)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "processor_seconds": round(processor, 2)}


def starts(preset_name: str) -> tuple[dict[str, float], dict[str, float]]:
    """The first start and the second."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checkpoint = random_checkpoint(preset_name, folder)
        # Not the first thing to read Python's and JAX's files from the disk.
        subprocess.run([sys.executable, "-c", "import jax.numpy, flax, av"], check=True)
        return start(checkpoint, folder, "first.mp4"), start(checkpoint, folder, "second.mp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    first, second = starts(arguments.preset)
    result: dict[str, Any] = {
        "what": f"longlive generate, preset {arguments.preset} with random weights, one block, whole process",
        "first": first,
        "second": second,
        "times_faster": {k: round(first[k] / second[k], 2) for k in first},
    }
    if arguments.no_save:
        print(result)
    else:
        common.save("start_up", result)


if __name__ == "__main__":
    main()
