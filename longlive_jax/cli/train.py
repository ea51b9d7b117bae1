"""`longlive train`: one stage of the recipe, from a config file."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from longlive_jax.cli import options
from longlive_jax.cli.common import setting
from longlive_jax.errors import UserError, require

if TYPE_CHECKING:
    from longlive_jax.training.config import Training
    from longlive_jax.training.loop import Resume

_DESCRIPTION = """\
Train one stage of the recipe. A config file is Python with a `get_config()`; any setting can be changed
by its dotted name. Everything is written to run.folder: checkpoints, metrics, a report, and `export`,
the checkpoint directory that `longlive generate` reads and that the next stage begins with.

Ctrl-C and SIGTERM save before they end the run (ahead of its first step there is nothing to save);
--resume auto goes on where it stopped, even after kill -9.

On several machines the same command is started on each, with --distributed where Slurm, Open MPI, Kubernetes
or a Cloud TPU says who they are, else with --coordinator, --processes and --process.
"""
_EXAMPLES = """\
examples:
  longlive train configs/toy/vae.py
  longlive train configs/toy/vae.py --resume auto
  longlive train configs/toy/teacher_block.py optimizer.learning_rate=1e-3 run.folder=runs/try
  longlive train configs/toy/vae.py smoke=true                a few tiny steps, to see that it works
  srun longlive train configs/toy/vae.py --distributed        one process per Slurm task
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
    options.add_compile_cache(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    several = parser.add_argument_group("several processes")
    several.add_argument(
        "--distributed", action="store_true", help="join the processes that the cluster's environment names"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached by all")
    several.add_argument("--processes", metavar="N", type=int, help="number of processes")
    several.add_argument("--process", metavar="I", type=int, help="which of them this is, from 0")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from longlive_jax.training import processes
    from longlive_jax.training.config_file import load_config

    address = address_of(arguments)
    names = [name for name, _ in arguments.settings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is given more than once")
    config = load_config(arguments.config, dict(arguments.settings))
    options.enable_compile_cache(arguments.compile_cache)
    if address is None and not arguments.distributed:
        return train(config, resume=arguments.resume, is_quiet=arguments.quiet)
    processes.connect(address)  # nothing has touched a device so far
    try:
        return train(config, resume=arguments.resume, is_quiet=arguments.quiet)
    except BaseException as error:
        processes.leave(error)


def train(config: "Training", *, resume: "Resume", is_quiet: bool) -> int:
    """Trains a stage and says how it went, once for all processes; returns the exit status."""
    from longlive_jax.training import loop, metrics, stages

    try:
        report = stages.train(config, resume=resume, is_quiet=is_quiet)
    except loop.Interrupted as stop:
        metrics.say(str(stop))
        return stop.status
    except loop.TrainingError as failure:
        metrics.say(f"error: {failure}")
        return 1
    lines = [f"{name:<14}{value:.4g}" for name, value in report["scores"].items()]
    metrics.say("\n".join([*lines, f"exported to {report['export']}"]), file=sys.stdout)
    return 0


def address_of(arguments: argparse.Namespace) -> Any:
    """This process's `training.processes.Address`, None where none is given; refuses a half-given one."""
    from longlive_jax.training.processes import Address

    names = ("coordinator", "processes", "process")
    missing = [name for name in names if getattr(arguments, name) is None]
    if len(missing) == len(names):
        return None
    require(
        not missing,
        f"{' and '.join(f'--{name}' for name in missing)} not given: --coordinator, --processes and "
        "--process belong together",
    )
    require(not arguments.distributed, "--distributed finds the processes itself; leave out --coordinator")
    return Address(arguments.coordinator, arguments.processes, arguments.process)
