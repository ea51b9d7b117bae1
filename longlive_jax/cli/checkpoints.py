"""`longlive setup | convert | export | inspect`: checkpoints in and out."""

import argparse
from typing import Any, get_args

from longlive_jax.cli.common import add_settings
from longlive_jax.cli.progress import bytes_progress
from longlive_jax.config import PRESETS, DType

_SETUP = """\
Fetch a published model from the Hugging Face hub, convert it, and say what to run next.
Files that are already in the hub's cache are not fetched again.
"""
_SETUP_EXAMPLES = """\
examples:
  longlive setup longlive-1.3b checkpoints/longlive-1.3b
  longlive setup longlive-1.3b checkpoints/longlive-1.3b --from-folder ~/mirror --dtype bfloat16
"""
_CONVERT = """\
Convert published weights into a checkpoint directory.

A source is a file, a folder or a hub repository ("org/name"): Wan2.1 in its original or its diffusers
form, LongLive's or Self-Forcing's .pt files, a trainer's checkpoint, a LoRA. What it is, is found
out from its contents. Of several sources that hold the same part the last one wins.
"""
_CONVERT_EXAMPLES = """\
examples:
  longlive convert Wan2.1-T2V-1.3B/ longlive_base.pt lora.pt checkpoints/longlive-1.3b
  longlive convert self_forcing_dmd.pt checkpoints/self-forcing --weights ema --dtype bfloat16
"""
_EXPORT = """\
Write a checkpoint back in a layout that PyTorch users load.

  longlive       one file like longlive_base.pt: generator, generator_ema and critic
  longlive-ema   one file with the averaged weights as generator_ema
  lora           one file like lora.pt, with PEFT's names
  wan            a folder in Wan2.1's original layout

Our config goes along (longlive_jax.json in the folder, the entry longlive_jax of a file; PyTorch programs
pass over both), so that `longlive convert` gives the same model back.
"""
_EXPORT_EXAMPLES = """\
examples:
  longlive export checkpoints/longlive-1.3b longlive_base.pt --layout longlive
  longlive export checkpoints/longlive-1.3b exported/ --layout wan
  longlive convert exported/ checkpoints/again
"""
_INSPECT = "Say what a file, a folder or a checkpoint holds, without reading its weights."

LAYOUTS = ("longlive", "longlive-ema", "lora", "wan")
LORA_MODES = ("merge", "keep")
WEIGHTS = ("both", "generator", "ema")


def add_commands(commands: Any) -> None:
    """Adds the four commands."""
    _add_setup(commands)
    _add_convert(commands)
    _add_export(commands)
    inspect = commands.add_parser(
        "inspect", help="say what a checkpoint or a file of weights holds", description=_INSPECT
    )
    inspect.add_argument("path", metavar="PATH", help="a file, a folder, a checkpoint or a hub repository")
    inspect.set_defaults(run=_run_inspect, parser=inspect)


def _add_setup(commands: Any) -> None:
    parser = commands.add_parser(
        "setup", help="fetch and convert a published model", description=_SETUP, epilog=_SETUP_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="name of the model: longlive-1.3b")
    parser.add_argument("destination", metavar="DST", help="checkpoint directory to make")
    parser.add_argument(
        "--from-folder",
        metavar="DIR",
        help="take the repositories from DIR/org/name instead of the hub (no network is used)",
    )
    _add_conversion(parser)
    parser.set_defaults(run=_run_setup, parser=parser)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn PyTorch weights into a checkpoint",
        description=_CONVERT,
        epilog=_CONVERT_EXAMPLES,
    )
    parser.add_argument("sources", metavar="SRC", nargs="+", help="what to convert (one or several)")
    parser.add_argument("destination", metavar="DST", help="checkpoint directory to make")
    _add_conversion(parser)
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="alpha of the LoRA where its file does not say (default: its rank)",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="both",
        help="of a file with plain and averaged (EMA) weights, keep both, or use only one (default: both)",
    )
    parser.add_argument(
        "--part",
        dest="parts",
        action="append",
        metavar="PART",
        help="convert only this part, e.g. transformer (repeatable; default: everything there is)",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"preset for what the files do not say: {', '.join(PRESETS)} (default: found from the shapes)",
    )
    add_settings(parser)
    parser.set_defaults(run=_run_convert, parser=parser)


def _add_conversion(parser: Any) -> None:
    parser.add_argument(
        "--dtype", choices=get_args(DType), help="precision to store (default: as in the source)"
    )
    parser.add_argument(
        "--lora", choices=LORA_MODES, default="merge", help="merge a LoRA or keep it apart (default: merge)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="write a checkpoint for PyTorch", description=_EXPORT, epilog=_EXPORT_EXAMPLES
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory")
    parser.add_argument("destination", metavar="DST", help="file to write (for wan: folder)")
    parser.add_argument("--layout", choices=LAYOUTS, default="longlive", help="see above (default: longlive)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(run=_run_export, parser=parser)


def _run_setup(arguments: argparse.Namespace) -> None:
    from longlive_jax.convert.setup import setup

    with bytes_progress("converting") as progress:
        report = setup(
            arguments.model,
            arguments.destination,
            source_root=arguments.from_folder,
            dtype=arguments.dtype,
            lora=arguments.lora,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(report)


def _run_convert(arguments: argparse.Namespace) -> None:
    from longlive_jax.convert.convert import convert

    with bytes_progress("converting") as progress:
        report = convert(
            arguments.sources,
            arguments.destination,
            dtype=arguments.dtype,
            lora=arguments.lora,
            lora_alpha=arguments.lora_alpha,
            weights=arguments.weights,
            parts=arguments.parts,
            preset=arguments.preset,
            overrides=dict(arguments.settings),
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(report)


def _run_export(arguments: argparse.Namespace) -> None:
    from longlive_jax.convert.export import export

    print(
        export(
            arguments.checkpoint,
            arguments.destination,
            layout=arguments.layout,
            overwrite=arguments.overwrite,
        )
    )


def _run_inspect(arguments: argparse.Namespace) -> None:
    from longlive_jax.convert.inspect import inspect

    print(inspect(arguments.path))
