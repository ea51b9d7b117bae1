"""`longlive memory | verify | version`: what is needed, whether it is right, what is installed."""

import argparse
import platform
from typing import Any, get_args

import longlive_jax
from longlive_jax.cli import options
from longlive_jax.cli.common import add_settings
from longlive_jax.config import PRESETS, DType, preset
from longlive_jax.errors import UserError, require

_MEMORY = """\
Show how much accelerator memory generating takes, part by part and in every precision, and on
which cards it fits. Nothing is loaded: the table is worked out from shapes.
"""
_MEMORY_EXAMPLES = """\
examples:
  longlive memory wan_1_3b
  longlive memory checkpoints/longlive-1.3b --height 720 --width 1280
  longlive memory wan_1_3b --set window.window_frames=21
"""
_VERIFY = """\
Run a checkpoint on inputs that were recorded with the PyTorch release and compare the outputs.
Prints a line per component with the largest and the mean error; exits with status 1 on a miss.

With --layers, compare a quantised checkpoint with the one it was made from: the error of every linear
layer, and of the activations after every block.
"""

_VERIFY_EXAMPLES = """\
examples:
  longlive verify checkpoints/longlive-1.3b --against recorded.npz
  longlive verify checkpoints/longlive-1.3b --against recorded.npz --dtype float32
  longlive verify checkpoints/longlive-1.3b-int8 --layers checkpoints/longlive-1.3b
  longlive verify checkpoints/longlive-1.3b --layers --set quantization=fp8
"""


class VersionAction(argparse.Action):
    """`--version`: looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any, **options: Any) -> None:
        print(f"longlive-jax {longlive_jax.__version__}")
        parser.exit()


def add_commands(commands: Any) -> None:
    """Adds the three commands."""
    _add_verify(commands)
    _add_memory(commands)
    version = commands.add_parser(
        "version", help="print versions and devices", description="Print what a bug report should say."
    )
    version.set_defaults(run=_run_version, parser=version)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a checkpoint with recorded PyTorch outputs",
        description=_VERIFY,
        epilog=_VERIFY_EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory")
    parser.add_argument(
        "--against",
        metavar="RECORDED.npz",
        help="recorded inputs and outputs (with --layers: whose inputs to use; default noise)",
    )
    parser.add_argument(
        "--layers",
        metavar="REFERENCE",
        nargs="?",
        const="",
        help="show the error of every quantised layer; REFERENCE is the checkpoint in full precision "
        "(default: CHECKPOINT itself, quantised by --set quantization=RECIPE)",
    )
    parser.add_argument(
        "--dtype", choices=get_args(DType), help="precision to compute in (default: the checkpoint's)"
    )
    for name, what in (("rtol", "relative to the recorded value"), ("atol", "absolute")):
        parser.add_argument(
            f"--{name}", type=float, metavar="X", help=f"largest error, {what} (default: by dtype; give both)"
        )
    add_settings(parser)
    options.add_compile_cache(parser)
    parser.set_defaults(run=_run_verify, parser=parser)


def _add_memory(commands: Any) -> None:
    parser = commands.add_parser(
        "memory", help="show the memory budget", description=_MEMORY, epilog=_MEMORY_EXAMPLES
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"checkpoint directory, or a preset: {', '.join(PRESETS)}"
    )
    parser.add_argument("--height", type=int, metavar="PIXELS", help="rows (default: the model's)")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="columns (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="videos side by side (default: 1)")
    parser.add_argument(
        "--frames", type=int, metavar="N", help="latent frames; needed where the window keeps everything"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ask this machine's compiler for the working memory instead of estimating it (a minute)",
    )
    add_settings(parser)
    parser.set_defaults(run=_run_memory, parser=parser)


def _run_memory(arguments: argparse.Namespace) -> None:
    for name in ("height", "width", "batch", "frames"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name}={value} must be positive")
    from longlive_jax import memory
    from longlive_jax.config_dict import override

    config = override(model_config(arguments.model), dict(arguments.settings))
    print(
        memory.budget(
            config,
            batch=arguments.batch,
            height=arguments.height,
            width=arguments.width,
            frames=arguments.frames,
            measure=memory.compiled_bytes if arguments.compile else None,
        )
    )


def model_config(model: str) -> Any:
    """The config of a preset, or of a checkpoint directory."""
    if model in PRESETS:
        return preset(model)
    from longlive_jax.checkpoint import open_checkpoint

    try:
        return open_checkpoint(model).config
    except UserError as error:
        raise UserError(f"{error}; the presets are {', '.join(PRESETS)}") from error


def _run_verify(arguments: argparse.Namespace) -> int:
    given = [value for value in (arguments.rtol, arguments.atol) if value is not None]
    require(len(given) != 1, "give both --rtol and --atol, or neither")
    require(
        all(value >= 0 for value in given), f"--rtol={arguments.rtol}, --atol={arguments.atol}: not negative"
    )
    require(
        arguments.against is not None or arguments.layers is not None,
        "give --against RECORDED.npz or --layers; see `longlive verify --help`",
    )
    from longlive_jax.verify import Tolerance, verify, verify_layers

    options.enable_compile_cache(arguments.compile_cache)
    overrides = dict(arguments.settings) | ({"dtype": arguments.dtype} if arguments.dtype else {})
    if arguments.layers is not None:
        require(not given, "--rtol and --atol do not apply to --layers, which only shows errors")
        reference = arguments.layers or None
        print(
            verify_layers(arguments.checkpoint, reference, recording=arguments.against, overrides=overrides)
        )
        return 0
    tolerance = Tolerance(rtol=arguments.rtol, atol=arguments.atol) if given else None
    rows = verify(arguments.checkpoint, arguments.against, overrides=overrides, tolerance=tolerance)
    width = max(len("component"), *(len(row.name) for row in rows))
    print(f"{'component':<{width}}  {'max error':>10}  {'mean error':>10}  {'mean value':>10}  verdict")
    for row in rows:
        numbers = f"{row.max_error:>10.2e}  {row.mean_error:>10.2e}  {row.scale:>10.2e}"
        allowed = f"rtol {row.tolerance.rtol:g}, atol {row.tolerance.atol:g}"
        print(f"{row.name:<{width}}  {numbers}  {'ok' if row.passed else f'MISS ({allowed})'}")
    return 0 if all(row.passed for row in rows) else 1


def _run_version(arguments: argparse.Namespace) -> None:
    import jax

    from longlive_jax.provenance import versions

    print(f"longlive-jax {longlive_jax.__version__}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"devices: {', '.join(f'{d.platform} {d.device_kind}' for d in jax.devices())}")
