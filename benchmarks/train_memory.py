"""Memory per device of the paper's distillation runs, as the compiler reports it.

    python -m benchmarks.train_memory [configs/wan/init.py configs/wan/long.py] [--devices 64]

Compiles every program at full shape for simulated devices; nothing is loaded and nothing runs. It is XLA's
CPU backend that reports, which multiplies bfloat16 matrices in float32 and holds float32 copies of them. A
GPU's figures will be others and have not been measured.
"""

import argparse
import os
import sys
from typing import Any

LIMIT_GIB = 80e9 / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("configs", nargs="*", default=["configs/wan/init.py", "configs/wan/long.py"])
    parser.add_argument("--devices", type=int, default=64, help="simulated devices")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="change a setting")
    parser.add_argument("--no-result", action="store_true", help="print only")
    arguments = parser.parse_args()
    # Before jax is imported: the number of simulated devices is fixed then.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={arguments.devices}"
    )
    from benchmarks import common
    from longlive_jax import sharding
    from longlive_jax.training import plan
    from longlive_jax.training.config import DistillTraining
    from longlive_jax.training.config_file import load_config

    found: dict[str, Any] = {}
    fits = True
    for path in arguments.configs:
        config = load_config(path, dict(setting.split("=", 1) for setting in arguments.set))
        assert isinstance(config, DistillTraining), path
        mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
        rows = []
        for program in plan.plan(config, mesh):
            gib = {
                name: round(getattr(program, f"{name}_bytes") / plan.GIB, 2)
                for name in ("argument", "output", "temporary", "peak")
            }
            seconds = round(program.compile_seconds)
            print(f"{path}  {program.name:<24} {gib} GiB, compiled in {seconds} s", flush=True)
            rows.append({"program": program.name, "gib": gib, "compile_seconds": seconds})
            fits = fits and gib["peak"] < LIMIT_GIB
        found[path] = {"mesh": dict(mesh.shape), "programs": rows}
    print("every program fits 80 GB" if fits else "NOT every program fits 80 GB")
    if not arguments.no_result:
        common.save("train_memory", {"devices": arguments.devices, "fits_80_gb": fits, "configs": found})
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
