"""Everything that decides the speed, beside the least time the machine could take for it.

    python -m benchmarks.run --suite gpu
    python -m benchmarks.run --suite cpu --only attention block_step

Every part runs in a process of its own and under a timeout, so a kernel that hangs costs its own numbers
only; correctness comes before timing. The result is a table and `results/suite_NAME.json`.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks import common
from benchmarks.parts import PARTS, SUITES

TIMEOUT = 480


def measured(part: str, suite: str, *, timeout: int) -> dict[str, Any]:
    """Runs one part and returns what it printed last, or what went wrong."""
    command = [sys.executable, "-m", "benchmarks.parts", part, "--suite", suite]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout} s"}
    if process.returncode:
        return {"failed": process.stderr.strip().splitlines()[-1:] or process.returncode}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def table(results: dict[str, Any]) -> str:
    """One line for every timing."""
    lines = [f"{'part':14}{'case':44}{'ms':>11}{'floor ms':>11}{'x floor':>9}"]
    for part, result in results.items():
        if "failed" in result:
            lines.append(f"{part:14}failed: {result['failed']}")
        for row in result.get("rows", ()):
            if "skipped" in row:
                lines.append(f"{part:14}{row['case']:44}skipped: {row['skipped']}")
                continue
            floor = f"{1e3 * row['floor_seconds']:11.3f}" if "floor_seconds" in row else " " * 11
            ratio = f"{row['times_floor']:9.2f}" if "times_floor" in row else " " * 9
            extra = "  ".join(f"{k}={row[k]}" for k in ("fps", "peak_mib", "error") if k in row)
            lines.append(f"{part:14}{row['case']:44}{1e3 * row['seconds']:11.3f}{floor}{ratio}  {extra}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds for each part")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for part in arguments.only:
        print(f"{part} ...", file=sys.stderr, flush=True)
        results[part] = measured(part, arguments.suite, timeout=arguments.timeout)
    if not arguments.no_save:
        common.save(f"suite_{arguments.suite}", results)
    print(table(results))


if __name__ == "__main__":
    main()
