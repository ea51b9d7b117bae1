"""The block step's time by window and by length of the video, from a suite's results.

    python -m benchmarks.plot cpu

Writes `results/suite_NAME.svg`; needs the extra `experiments` (matplotlib).
"""

import argparse
import json
import pathlib
import re
from typing import Any

from benchmarks.common import RESULTS


def points(rows: list[dict[str, Any]], pattern: str) -> list[tuple[float, float, float]]:
    """(what the pattern's group says, milliseconds, floor in milliseconds) of the rows that match."""
    found = [(re.fullmatch(pattern, row["case"]), row) for row in rows]
    return sorted(
        (float(match[1]), 1e3 * row["seconds"], 1e3 * row["floor_seconds"]) for match, row in found if match
    )


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Two panels: the cost grows with the window, and not with the video."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, points(results["windows"]["rows"], r"window=(\d+) sink=3"), "window, latent frames"),
        (right, points(results["length"]["rows"], r"after (\d+) s"), "video so far, seconds"),
    )
    for axes, data, label in panels:
        x, measured, floor = zip(*data, strict=True)
        axes.plot(x, measured, "o-", label="measured")
        axes.plot(x, floor, "--", label="floor")
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
    left.set_ylabel("milliseconds a block")
    left.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite")
    arguments = parser.parse_args()
    results = json.loads((RESULTS / f"suite_{arguments.suite}.json").read_text())
    draw(results, RESULTS / f"suite_{arguments.suite}.svg")


if __name__ == "__main__":
    main()
