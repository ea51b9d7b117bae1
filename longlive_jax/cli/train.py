"""`longlive train`: one stage of the recipe, from a config file."""

import argparse
import sys
from typing import Any

from longlive_jax.cli.common import note, setting
from longlive_jax.errors import UserError

_DESCRIPTION = """\
Train one stage of the recipe. A config file is Python with a `get_config()`; any setting can be changed
by its dotted name. Everything is written to run.folder: checkpoints, metrics, a report, and `export`,
the checkpoint directory that `longlive generate` reads and that the next stage begins with.

Ctrl-C and SIGTERM save before they end the run; --resume auto goes on where it stopped, even after kill -9.
"""
_EXAMPLES = """\
examples:
  longlive train configs/toy/vae.py
  longlive train configs/toy/vae.py --resume auto
  longlive train configs/toy/teacher_1.py optimizer.learning_rate=1e-3 run.folder=runs/try
  longlive train configs/toy/vae.py smoke=true                a few tiny steps, to see that it works
"""


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("train", help="train one stage", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("config", metavar="CONFIG.py", help="config file with a get_config()")
    parser.add_argument(
        "settings",
        metavar="NAME=VALUE",
        type=setting,
        nargs="*",
        default=(),
        help="change a setting by its dotted name, e.g. run.steps=100",
    )
    parser.add_argument(
        "--resume",
        choices=("never", "auto"),
        default="never",
        help="auto: continue the run that run.folder holds, if there is one (default: refuse it)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from longlive_jax.training import loop, stages
    from longlive_jax.training.config import load_config

    names = [name for name, _ in arguments.settings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is given more than once")
    config = load_config(arguments.config, dict(arguments.settings))
    try:
        report = stages.train(config, resume=arguments.resume, is_quiet=arguments.quiet)
    except loop.Interrupted as stop:
        note(str(stop))
        return stop.status
    except loop.TrainingError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    for name, value in report["scores"].items():
        print(f"{name:<14}{value:.4g}")
    print(f"exported to {report['export']}")
    return 0
