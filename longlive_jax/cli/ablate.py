"""`longlive ablate`: a study's missing cells, then its table, figures and report."""

import argparse
import pathlib
from typing import Any

from longlive_jax.cli import options
from longlive_jax.cli.common import note, setting
from longlive_jax.errors import require

_DESCRIPTION = """\
Run a study: a grid of conditions, each with several seeds, on the same prompts and the same noise.

Every cell (one condition with one seed) is stored when it is done, and found again by everything its numbers
depend on: run the same command again after an interruption, with another seed or a larger grid, and only what
is missing is run. When all cells are there, the table (CSV and JSON lines), the figures and report.md are
written.
"""
_EXAMPLES = """\
examples:
  longlive ablate experiments/window_sink/config.py
  longlive ablate experiments/window_sink/config.py clips=4 batch=4 seeds=1,2 task.frames=21    a first look
  longlive ablate experiments/window_sink/config.py --estimate
  longlive ablate experiments/long_tuning/config.py --checkpoint "short only=runs/toy/init/export"
  longlive ablate experiments/window_sink/config.py --shard 0/2     on one machine, --shard 1/2 on another
  longlive report outputs/window_sink                               its page with videos
"""


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "ablate", help="run a study and write its table, plots and report", description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG.py", help="file with a get_config() that returns a Study")
    parser.add_argument(
        "settings",
        metavar="NAME=VALUE",
        type=setting,
        nargs="*",
        default=(),
        help="change a setting of the study, e.g. clips=8, seeds=1,2, task.frames=21, checkpoint=DIR",
    )
    parser.add_argument(
        "--checkpoint",
        dest="checkpoints",
        metavar="NAME=DIR",
        type=setting,
        action="append",
        default=[],
        help="where a checkpoint of the axis `checkpoint` is (repeatable)",
    )
    parser.add_argument("--out", metavar="DIR", help="where results go (default: outputs/<study>)")
    parser.add_argument(
        "--estimate", action="store_true", help="say what would be run and how long it takes, and stop"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="put table, figures and report into the README beside the config as well",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--devices", type=int, metavar="N", help="cells side by side (default: all devices)")
    machine.add_argument(
        "--shard", metavar="I/N", default="0/1", help="run this share; the processes share --out"
    )
    machine.add_argument(
        "--compile-cache",
        action=argparse.BooleanOptionalAction,
        help="keep compiled programs in $LONGLIVE_CACHE or ~/.cache/longlive-jax (default: yes)",
    )
    machine.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from longlive_jax.experiments import plots, report, runner, table
    from longlive_jax.experiments.parallel import Shard
    from longlive_jax.experiments.study import load_study

    for given in (arguments.settings, arguments.checkpoints):
        names = [name for name, _ in given]
        require(len(set(names)) == len(names), f"{', '.join(names)}: a name is given more than once")
    study = load_study(arguments.config, dict(arguments.settings), checkpoints=dict(arguments.checkpoints))
    plots.check_installed(study)
    home = pathlib.Path(arguments.config).resolve().parent
    if arguments.publish:
        report.check_place(home / "README.md")
    folder = pathlib.Path(arguments.out or f"outputs/{study.name}")
    plan = runner.make_plan(study, folder, shard=Shard.parse(arguments.shard), devices=arguments.devices)
    options.enable_compile_cache(arguments.compile_cache)
    with options.device_memory():
        if not arguments.quiet or arguments.estimate:
            text = f"{plan}; {runner.estimate(plan)}" if plan.missing else str(plan)
            (print if arguments.estimate else note)(text)
        if arguments.estimate:
            return
        runner.run(plan, folder, is_quiet=arguments.quiet)
    if not plan.is_complete:
        print(
            f"{folder}: this share is done; the report is written by the process that finishes the last one"
        )
        return
    result = table.collect(study, plan.cells)
    files = report.write(result, folder)
    print(report.results_table(result))
    print("\n".join(map(str, files)))
    if arguments.publish:
        print(report.publish(result, folder, home))
