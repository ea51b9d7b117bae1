"""Peak memory of conversion and export on a synthetic checkpoint of about 2 GB.

    python benchmarks/convert_memory.py [--layers 10] [--output benchmarks/results/convert_memory.json]

Each case runs in a process of its own, which reports its `ru_maxrss`. This process imports nothing
heavy, because a child's figure starts from what its parent occupied. Mapped pages count, so a reader
that leaves the whole file mapped shows. `base` is the same process with the imports alone.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from importlib import metadata

LIMIT = 1.3  # of the largest source file

_PREAMBLE = """
import pathlib, resource, sys, time
folder, layers = pathlib.Path(sys.argv[1]), int(sys.argv[2])
import numpy as np, torch
from longlive_jax.config import WAN_1_3B
import dataclasses
config = dataclasses.replace(WAN_1_3B, num_layers=layers)
from longlive_jax.convert.convert import convert
from longlive_jax.convert.export import export
from longlive_jax.convert import keys_transformer, shapes
from longlive_jax.storage import Spec, write_tensors
started = time.monotonic()
"""

_REPORT = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak, time.monotonic() - started)
"""

_GENERATE = """
from longlive_jax.config import PRESETS
tree = shapes.expected("transformer", dataclasses.replace(PRESETS["wan_1_3b"], transformer=config))
specs, rng = {}, np.random.default_rng(0)
for name, rule, layer in keys_transformer.table(config).sources():
    shape = tree[rule.target].shape[0 if layer is None else 1:]
    specs[name] = Spec(rule.to_source(np.broadcast_to(np.int8(0), shape)).shape, np.dtype(np.float32))
pieces = ((name, rng.random(spec.shape, np.float32)) for name, spec in specs.items())
write_tensors(folder / "wan.safetensors", specs, pieces)
import safetensors.torch
tensors = safetensors.torch.load_file(folder / "wan.safetensors")
torch.save({"generator": {"model." + k: v for k, v in tensors.items()}}, folder / "base.pt")
torch.save({k: v for k, v in tensors.items()}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
lora = keys_transformer.lora_table(layers, __import__("longlive_jax.lora").lora.ALL_TARGETS)
state = {}
for name, rule, layer in lora.sources():
    out, inp = specs[name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"].shape
    state[name] = torch.zeros(256, inp) if ".lora_A." in name else torch.zeros(out, 256)
torch.save({"generator_lora": state}, folder / "lora.pt")
"""

# Name -> (files whose largest sets the limit, what runs).
CASES = {
    "base": ((), ""),
    "convert safetensors": (("wan.safetensors",), "convert(folder / 'wan.safetensors', folder / 'a')"),
    "convert .pt": (("base.pt",), "convert(folder / 'base.pt', folder / 'b')"),
    "convert .pt to bfloat16": (("base.pt",), "convert(folder / 'base.pt', folder / 'c', dtype='bfloat16')"),
    "convert .pt and merge a LoRA of rank 256": (
        ("base.pt", "lora.pt"),
        "convert([folder / 'base.pt', folder / 'lora.pt'], folder / 'd')",
    ),
    "convert .pt of the old format": (("legacy.pt",), "convert(folder / 'legacy.pt', folder / 'e')"),
    "export safetensors": (
        ("b/transformer.safetensors",),
        "export(folder / 'b', folder / 'f', layout='wan')",
    ),
    "export .pt": (
        ("b/transformer.safetensors",),
        "export(folder / 'b', folder / 'g.pt', layout='longlive')",
    ),
}


def run(body: str, folder: pathlib.Path, layers: int) -> tuple[int, float]:
    """Runs code in a fresh process; returns its peak resident bytes and seconds."""
    command = [sys.executable, "-c", _PREAMBLE + body + _REPORT, str(folder), str(layers)]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    peak, seconds = result.stdout.split()[-2:]
    return int(peak), float(seconds)


def measure(folder: pathlib.Path, layers: int) -> list[dict]:
    """Runs all cases on files generated in `folder`."""
    run(_GENERATE, folder, layers)
    rows = []
    for name, (files, body) in CASES.items():
        peak, seconds = run(body, folder, layers)
        largest = max(((folder / file).stat().st_size for file in files), default=0)
        row = {
            "case": name,
            "largest_source_bytes": largest,
            "peak_rss_bytes": peak,
            "seconds": round(seconds, 2),
        }
        if largest:
            row["peak_over_largest_source"] = round(peak / largest, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def machine() -> dict:
    """What the numbers depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("jax", "numpy", "torch", "safetensors")
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10, help="transformer layers; 10 make a file of 2 GB")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="JSON file for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(pathlib.Path(folder), arguments.layers)
    report = {"machine": machine(), "layers": arguments.layers, "limit": LIMIT, "cases": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    over = [row["case"] for row in rows if row.get("peak_over_largest_source", 0) > LIMIT]
    print(f"over {LIMIT} x the largest source: {', '.join(over) or 'none'}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
