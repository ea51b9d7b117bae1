"""What every benchmark shares: the machine's description, side-by-side timing, the JSON result."""

import importlib
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, memory, devices and versions; nothing that identifies a host."""
    import jax

    versions = {"python": platform.python_version(), "jax": jax.__version__}
    try:
        import torch

        versions["torch"] = torch.__version__
    except ImportError:
        pass
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "versions": versions,
    }


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def side_by_side(ours: Callable[[], Any], theirs: Callable[[], Any], *, repeats: int) -> dict[str, Any]:
    """Times two calls in turn, A B A B, after one untimed call of each.

    Returns:
      Seconds of each (median, minimum, maximum) and the median of the ratios ours / theirs pair by pair.
    """
    pairs = in_turn(ours, theirs, repeats=repeats)
    return {
        "ours_seconds": summary([a for a, _ in pairs]),
        "theirs_seconds": summary([b for _, b in pairs]),
        "ratio": summary([a / b for a, b in pairs]),
        "repeats": repeats,
    }


def in_turn(ours: Callable[[], Any], theirs: Callable[[], Any], *, repeats: int) -> list[tuple[float, float]]:
    """Seconds of two calls in turn, A B A B, after one untimed call of each; both return finished results."""
    ours()
    theirs()
    return [(_seconds(ours), _seconds(theirs)) for _ in range(repeats)]


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def process_peak_mib(process: int | None = None) -> float | None:
    """Most memory a process has held so far, in MiB; None if it is not there any more.

    Not `ru_maxrss`: of a child that is at least what its parent held when it was started.

    Args:
      process: its number; None: this one.
    """
    try:
        status = pathlib.Path(f"/proc/{process or 'self'}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if peak is None else round(int(peak.split()[1]) / 1024, 1)


def absence(package: str) -> str | None:
    """Why an optional package cannot be used here; None where it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as problem:  # of any kind: a release that was made for other versions of what it imports
        return f"{package} does not import: {problem}"
    return None


def torch_device() -> str:
    """Where PyTorch computes here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_wait(result: Any) -> Any:
    """Blocks until PyTorch has computed a result, and returns it; on a CPU it has."""
    import torch

    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def save(name: str, result: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results/NAME.json` with the machine's description and prints it."""
    path = write(name, {"machine": machine(), **result})
    print(path.read_text(), end="")
    return path


def write(name: str, result: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results/NAME.json` as it is."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
