"""`longlive quantize`: a checkpoint in 8 bits."""

import argparse
from typing import Any, get_args

from longlive_jax.cli.progress import bytes_progress
from longlive_jax.config import Recipe

_QUANTIZE = """\
Write a copy of a checkpoint whose transformer is stored in 8 bits, about half the size.

  int8              8-bit integers, and products of 8-bit integers
  int8-rotated      the same, with the input channels mixed first: for models with outlier channels
  int8-weight-only  8-bit integers in storage only; products as before
  fp8               8-bit floats (e4m3), and products of these
  fp8-weight-only   8-bit floats in storage only; products as before

No data is needed: activations are scaled token by token as they come. A LoRA is merged first. The copy is
complete by itself, and every command takes it. docs/quantization.md says when to use which.
"""
_EXAMPLES = """\
examples:
  longlive quantize checkpoints/longlive-1.3b checkpoints/longlive-1.3b-int8 --recipe int8
  longlive verify checkpoints/longlive-1.3b-int8 --layers checkpoints/longlive-1.3b
  longlive generate --checkpoint checkpoints/longlive-1.3b-int8 --set cache_dtype=int8 --prompt "A red fox."
"""

NAMES = tuple(name for name in get_args(Recipe) if name != "none")


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "quantize",
        help="store the transformer in 8 bits, half as large",
        description=_QUANTIZE,
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="SRC", help="checkpoint directory")
    parser.add_argument("destination", metavar="DST", help="checkpoint directory to make")
    parser.add_argument("--recipe", choices=NAMES, default="int8", help="see above (default: int8)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.set_defaults(run=_run_quantize, parser=parser)


def _run_quantize(arguments: argparse.Namespace) -> None:
    from longlive_jax.quantize.store import quantize_checkpoint

    with bytes_progress("quantising") as progress:
        report = quantize_checkpoint(
            arguments.checkpoint,
            arguments.destination,
            recipe=arguments.recipe,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(report)
