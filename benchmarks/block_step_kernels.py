"""What the time of one block step is made of, kernel by kernel, on a GPU.

    python -m benchmarks.block_step_kernels --attention cudnn

Profiles one block of a full window (wan_1_3b, 832x480, random weights) and adds up the kernels by name.
"""

import argparse
import collections
import glob
import tempfile
from typing import Any

import jax

from benchmarks import common
from benchmarks.parts import started
from benchmarks.suites import SUITES
from longlive_jax.config import WindowConfig
from longlive_jax.inference import rollout

SHOWN = 30
FILLING_BLOCKS = 5


def kernels(folder: str) -> list[dict[str, Any]]:
    """Kernels of a profile, the longest first."""
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    spent: collections.defaultdict[str, list[float]] = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            if "stream" in line.name.lower():
                for event in line.events:
                    spent[event.name].append(event.duration_ns / 1e6)
    found = [{"kernel": k, "launches": len(ms), "ms": round(sum(ms), 3)} for k, ms in spent.items()]
    return sorted(found, key=lambda row: -row["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=tuple(SUITES), default="gpu")
    parser.add_argument("--attention", default="auto")
    arguments = parser.parse_args()
    generator, params, state = started(
        SUITES[arguments.suite], WindowConfig(12, 3, 3), attention=arguments.attention
    )
    for _ in range(FILLING_BLOCKS):
        state, latents = rollout.step(generator, params, state)
    jax.block_until_ready(latents)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(rollout.step(generator, params, state))
        found = kernels(folder)
    total = round(sum(row["ms"] for row in found), 2)
    result = {"attention": arguments.attention, "total_ms": total, "kernels": found[:SHOWN]}
    common.save("block_step_kernels_gpu", {"what": __doc__.splitlines()[0], **result})


if __name__ == "__main__":
    main()
