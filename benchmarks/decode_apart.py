"""Whether a block is decoded while the next one is denoised, where the VAE has a device of its own.

    python -m benchmarks.decode_apart toy
    python -m benchmarks.decode_apart --preset wan_1_3b --name decode_apart_gpu

The same stream, in turn on one device and with `Pipeline.over(decodes_apart=True)` on two; the ratio of the
seconds is what counts. Beside them the stream without a VAE: what is left where all of the decode is hidden.
Without two real devices the CPU's cores are two simulated ones, and each program has one thread. With a
preset the weights are random.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:
    from longlive_jax.inference.pipeline import Pipeline

REPEATS = 5
FRAMES = 60
PROMPT = "a red square moving left on a dark background"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT")
    what.add_argument("--preset", help="a model of this shape")
    parser.add_argument("--frames", type=int, default=FRAMES, help="latent frames of each stream")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--name", default="decode_apart", help="of the result's file")
    arguments = parser.parse_args()
    for name in ("frames", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)} must be positive")
    # Before jax is imported; without effect on GPUs.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
    )
    from benchmarks.interactive import random_pipeline
    from longlive_jax.config import preset
    from longlive_jax.inference.pipeline import Pipeline

    if arguments.preset:
        pipe = random_pipeline(preset(arguments.preset))
    else:
        pipe = Pipeline.load(arguments.checkpoint)
    found = measure(pipe, frames=arguments.frames, repeats=arguments.repeats)
    what = "streams: ours has a device for the VAE (apart) or no VAE, theirs is all on one device"
    common.save(arguments.name, {"what": what, "model": arguments.preset or arguments.checkpoint, **found})


def measure(one: "Pipeline", *, frames: int, repeats: int) -> dict[str, Any]:
    """Times streams of so many latent frames; see `common.side_by_side`."""
    import jax

    two = one.over(decodes_apart=True)
    video = one.config.video

    def stream(pipe: "Pipeline") -> None:
        for _ in pipe.stream(PROMPT, frames=frames):
            pass

    def latents() -> None:
        jax.block_until_ready([block for _, block in one.stream_latents(PROMPT, frames=frames)])

    return {
        "dtype": one.config.dtype,
        "size": [video.height, video.width],
        "latent_frames": frames,
        "apart": common.side_by_side(lambda: stream(two), lambda: stream(one), repeats=repeats),
        "no_vae": common.side_by_side(latents, lambda: stream(one), repeats=repeats),
    }


if __name__ == "__main__":
    main()
