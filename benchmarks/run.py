"""Everything that decides the speed, beside the least time the machine could take for it.

    python -m benchmarks.run --suite gpu
    python -m benchmarks.run --suite cpu --only attention block_step

Every part runs in a process of its own and under a timeout, so a kernel that hangs costs its own numbers
only; correctness comes before timing. With --warm all parts run once at the same time before, untimed, to
fill JAX's compilation cache: on a machine with many cores that takes as long as the slowest of them.

The result is a table and `results/suite_SUITE.json`, or `results/NAME.json` with --name. Every part in it
says which machine it was measured on. A part that is measured again takes the place of the one before unless
it fails; where that one is of another machine, other versions or other XLA flags, this is refused before
anything runs. All other parts stay as they are.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.parts import PARTS, SUITES

TIMEOUT = 480
EXTRA = (
    *("fps", "program_mib", "first_frame_seconds", "process_peak_mib", "error"),
    *("difference", "ours_over_theirs", "first_over_second"),
)

CACHE = "JAX_COMPILATION_CACHE_DIR"
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
FLAGS = "XLA_FLAGS"
DESCRIBE = "import json; from benchmarks import common; print(json.dumps(common.machine()))"


def measured(part: str, suite: str, *, timeout: int, is_warming: bool = False) -> dict[str, Any]:
    """Runs one part and returns what it measured, and what went wrong."""
    command = [sys.executable, "-m", "benchmarks.parts", part, "--suite", suite]
    command += ["--repeats", "1"] if is_warming else []
    environment = os.environ | (SHARED_DEVICE if is_warming else {})
    problem: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=errors, timeout=timeout, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            problem = {"failed": f"not done after {timeout} s"}
        else:
            errors.seek(0)
            problem = {"failed": errors.read().strip().splitlines()[-1:] or code} if code else {}
        out.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
    process: dict[str, Any] = next((line["process"] for line in lines if "process" in line), {})
    return {**process, "rows": [line for line in lines if "case" in line], **problem}


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
            extra = "  ".join(f"{k}={row[k]}" for k in EXTRA if k in row)
            lines.append(f"{part:14}{row['case']:44}{1e3 * row['seconds']:11.3f}{floor}{ratio}  {extra}")
    return "\n".join(lines)


def here() -> dict[str, Any]:
    """What a part says of where it was measured; asked in a process of its own, so as to hold no device."""
    found = subprocess.run([sys.executable, "-c", DESCRIBE], stdout=subprocess.PIPE, text=True, check=True)
    flags = os.environ.get(FLAGS)
    return {"machine": json.loads(found.stdout)} | ({"xla_flags": flags} if flags else {})


def stored(name: str) -> dict[str, Any]:
    """The parts of a result; none where there is no such file."""
    file = common.RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def check(name: str, parts: Sequence[str], place: Mapping[str, Any]) -> None:
    """Ends the program where one of the parts would replace what was measured elsewhere than at `place`."""
    old, facts = stored(name), ("machine", "xla_flags")
    foreign = [part for part in parts if part in old and any(old[part].get(x) != place.get(x) for x in facts)]
    if foreign:
        sys.exit(
            f"results/{name}.json holds {', '.join(foreign)} of another machine, other versions or other XLA "
            "flags; choose another file with --name, or add --replace"
        )


def updated(old: Mapping[str, Any], part: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The stored parts with one measured again, unless that failed and the one before did not."""
    if "failed" in found and part in old and "failed" not in old[part]:
        return dict(old)
    return {**old, part: dict(found)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds for each part")
    parser.add_argument("--name", help="of the result (default: suite_SUITE)")
    parser.add_argument("--replace", action="store_true", help="also parts that were measured elsewhere")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--warm", action="store_true", help="compile the parts side by side first")
    arguments = parser.parse_args()
    arguments.name = arguments.name or f"suite_{arguments.suite}"
    place = {} if arguments.no_save else here()
    if not arguments.no_save and not arguments.replace:
        check(arguments.name, arguments.only, place)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.warm:
            os.environ |= {CACHE: os.environ.get(CACHE, folder), **CACHE_ALL}
            warm_up(arguments)
        measure(arguments, place)


def warm_up(arguments: argparse.Namespace) -> None:
    """Runs all parts once, at the same time."""
    print("compiling ...", file=sys.stderr, flush=True)
    run = functools.partial(measured, suite=arguments.suite, timeout=arguments.timeout, is_warming=True)
    with concurrent.futures.ThreadPoolExecutor(len(arguments.only)) as pool:
        for part, found in zip(arguments.only, pool.map(run, arguments.only), strict=True):
            if "failed" in found:
                print(f"{part}: {found['failed']}", file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace, place: Mapping[str, Any]) -> None:
    """Runs the parts one after the other, keeps each when it is done, and prints the table."""
    results = {}
    for part in arguments.only:
        print(f"{part} ...", file=sys.stderr, flush=True)
        found = measured(part, arguments.suite, timeout=arguments.timeout)
        results[part] = {**place, **found}
        if not arguments.no_save:
            common.write(arguments.name, updated(stored(arguments.name), part, results[part]))
    print(table(results))


if __name__ == "__main__":
    main()
