"""How long `make demo` takes, environment creation aside.

    python -m benchmarks.demo

Each run is a process of its own with an empty cache folder: imports, weights, compilation, fifteen seconds of
video with a prompt switch, the files.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import common
from longlive_jax import storage

RUNS = 3
_SCRIPT = pathlib.Path(__file__).parents[1] / "examples/demo.py"


def run(folder: pathlib.Path) -> dict[str, float]:
    """Makes the demo in an empty folder; `seconds` of the process and `video_seconds` of what it made."""
    variables = os.environ | {"LONGLIVE_CACHE": str(folder / "cache")}
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, str(_SCRIPT), str(folder / "out")], env=variables, check=True, stdout=sys.stderr
    )
    seconds = time.perf_counter() - begin
    made = storage.read_json(folder / "out/demo.json")["video"]["seconds"]
    return {"seconds": round(seconds, 1), "video_seconds": round(made, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs={arguments.runs} must be positive")
    runs = []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            runs.append(run(pathlib.Path(name)))
    seconds = statistics.median(found["seconds"] for found in runs)
    common.save(
        "demo",
        {
            "what": "examples/demo.py with an empty cache folder, whole process; median of the runs",
            "seconds": seconds,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
