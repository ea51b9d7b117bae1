"""What several devices of one video exchange per block, from shapes alone.

    python -m benchmarks.communication

Compares what is implemented (heads first, then tokens) with tokens alone, and with a ring that passes the
keys and values of the whole window around. Nothing is timed and nothing is computed.
"""

import dataclasses
from typing import Any

from benchmarks.common import save
from longlive_jax.config import preset
from longlive_jax.inference import parallel
from longlive_jax.inference.parallel import Layout
from longlive_jax.ops.windowed_attention.spread import Spread

LATENT_SIZE = (60, 104)  # 832x480


def row(name: str, devices: int) -> dict[str, Any]:
    """Megabytes that each device receives per block, by method."""
    config = dataclasses.replace(preset(name), dtype="bfloat16")
    shape: dict[str, Any] = {"batch": 1, "latent_size": LATENT_SIZE}
    layout = parallel.layout_of(config, devices=devices, **shape)
    by_tokens = Layout(1, Spread(devices, 1))
    sizes = {
        "ours": parallel.traffic(config, layout, **shape),
        "tokens_only": parallel.traffic(config, by_tokens, **shape),
        "ring": parallel.ring_traffic(config, devices, latent_size=LATENT_SIZE),
    }
    return {
        "model": name,
        "devices": devices,
        "layout": str(layout),
        **{f"{method}_mb": round(size / 1e6) for method, size in sizes.items()},
    }


def main() -> None:
    rows = [row(name, devices) for name in ("wan_1_3b", "wan_14b") for devices in (2, 4, 8)]
    save("communication", {"size": "832x480", "window_frames": 12, "block_frames": 3, "rows": rows})


if __name__ == "__main__":
    main()
