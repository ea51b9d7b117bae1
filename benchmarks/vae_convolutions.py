"""The 3x3x3 convolutions of Wan's VAE in four forms, at the sizes of a block of 832x480, on a GPU.

    python -m benchmarks.vae_convolutions

As they are (one 3D convolution, channels last), channels first, as one 2D convolution over the stacked
channels of the three temporal taps, and as the sum of three 2D convolutions.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.suites import compiled, draw, median_seconds
from longlive_jax.models.vae_layers import convolve_directly, convolve_stacked

SIZES = ((12, 480, 832, 96), (12, 240, 416, 192), (6, 120, 208, 384), (3, 60, 104, 384))
"""Frames, rows, columns, channels in and out."""


def images(frames: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution of every frame `[T, y, x, D]`."""
    return jax.lax.conv_general_dilated(
        frames, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def channels_first(frames: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[1, D, 2 + T, y, x]` and `[E, D, 3, 3, 3]`."""
    padding = ((0, 0), (1, 1), (1, 1))
    names = ("NCDHW", "OIDHW", "NCDHW")
    return jax.lax.conv_general_dilated(frames, kernel, (1, 1, 1), padding, dimension_numbers=names)


def by_taps(frames: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve_directly` as three 2D convolutions, in the dtype of the frames."""
    length = frames.shape[1] - 2
    return sum(images(frames[0, tap : tap + length], kernel[tap]) for tap in range(3))[None]


FORMS: dict[str, Any] = {"3d": convolve_directly, "stacked": convolve_stacked, "taps": by_taps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide rows and columns, to try it on a CPU")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    jobs, work = {}, {}
    for length, rows, columns, channels in SIZES:
        rows, columns = rows // arguments.shrink, columns // arguments.shrink
        frames = draw(0, (1, length + 2, rows, columns, channels), "bfloat16")
        kernel = 0.02 * draw(1, (3, 3, 3, channels, channels), "bfloat16")
        first = (jnp.moveaxis(frames, -1, 1), jnp.transpose(kernel, (4, 3, 0, 1, 2)))
        forms = {name: (jax.jit(form), (frames, kernel)) for name, form in FORMS.items()}
        for name, job in {**forms, "3d ncdhw": (jax.jit(channels_first), first)}.items():
            case = f"{name} {length}x{rows}x{columns} {channels}->{channels}"
            jobs[case], work[case] = job, 2 * 27 * channels**2 * length * rows * columns
    found = []
    for case, run in compiled(jobs).items():
        seconds = median_seconds(functools.partial(run, *jobs[case][1]), 5)
        rate = round(work[case] / seconds / 1e12, 1)
        found.append({"case": case, "ms": round(seconds * 1e3, 3), "tflop_per_second": rate})
        print(found[-1], flush=True)
    if not arguments.no_save:
        common.save("vae_convolutions_gpu", {"what": __doc__.splitlines()[0], "rows": found})


if __name__ == "__main__":
    main()
