"""`longlive quantize` on a synthetic full-size wan_1_3b: size on disk and in memory, peak memory.

    python -m benchmarks.quantize_memory [--recipe int8] [--layers 30]

Writes 4.3 GB below the temporary folder ($TMPDIR). Each case runs in a process of its own, which reports its
`ru_maxrss`; pages of mapped files count. `base` is the same process with the imports alone. Exits with
status 1 where more than 6 GB are taken or less than 1.9x is saved.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

LIMIT_BYTES = 6 * 2**30
LIMIT_RATIO = 1.9

_PREAMBLE = """
import dataclasses, json, pathlib, resource, sys, time
folder, layers, recipe = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
import jax, numpy as np, ml_dtypes
from longlive_jax import checkpoint
from longlive_jax.config import PRESETS
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.memory import tree_bytes
from longlive_jax.quantize.store import quantize_checkpoint
config = PRESETS["wan_1_3b"]
config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, num_layers=layers))
result, started = {}, time.monotonic()
"""

_REPORT = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"peak_rss_bytes": peak, "seconds": round(time.monotonic() - started, 1), **result}))
"""

_GENERATE = """
from longlive_jax.convert import shapes
from longlive_jax.storage import Spec
bf16 = np.dtype(ml_dtypes.bfloat16)
specs = {n: Spec(s.shape, bf16) for n, s in shapes.expected("transformer", config).items()}
rng = np.random.default_rng(0)
def pieces():
    for name, spec in specs.items():
        for _ in range(spec.shape[0] if len(spec.shape) == 3 else 1):
            shape = spec.shape[1:] if len(spec.shape) == 3 else spec.shape
            yield name, (0.05 * rng.standard_normal(shape, np.float32)).astype(bf16)
with checkpoint.create(folder / "big", config, source={}) as out:
    out.add("transformer", specs, pieces())
"""

_LOAD = """
pipe = Pipeline.load(folder / {name!r})
result["weights_bytes"] = tree_bytes(pipe.params)
"""

CASES = {
    "base": "",
    "quantize": "quantize_checkpoint(folder / 'big', folder / 'small', recipe=recipe)",
    "load in bfloat16": _LOAD.format(name="big"),
    "load quantised": _LOAD.format(name="small"),
}


def run(body: str, folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """Runs code in a fresh process and returns what it reports."""
    command = [sys.executable, "-c", _PREAMBLE + body + _REPORT]
    command += [str(folder), str(arguments.layers), arguments.recipe]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30, help="transformer layers (default: all 30)")
    parser.add_argument("--recipe", default="int8")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run(_GENERATE, folder, arguments)
        cases = {}
        for case, body in CASES.items():
            cases[case] = run(body, folder, arguments)
            print(case, json.dumps(cases[case]), flush=True)
        files = [(folder / part / "transformer.safetensors").stat().st_size for part in ("big", "small")]
    weights = [cases[case]["weights_bytes"] for case in ("load in bfloat16", "load quantised")]
    report = {
        "what": __doc__.splitlines()[0],
        "recipe": arguments.recipe,
        "layers": arguments.layers,
        "disk_bytes": files,
        "disk_ratio": round(files[0] / files[1], 3),
        "memory_bytes": weights,
        "memory_ratio": round(weights[0] / weights[1], 3),
        "limits": {"peak_rss_bytes": LIMIT_BYTES, "ratio": LIMIT_RATIO},
        "cases": cases,
    }
    from benchmarks import common  # here: it imports JAX, and a child's figure starts from its parent's

    common.save("quantize_memory", report)
    small = min(report["disk_ratio"], report["memory_ratio"]) >= LIMIT_RATIO
    return 0 if small and cases["quantize"]["peak_rss_bytes"] <= LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
