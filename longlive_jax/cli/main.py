"""`longlive`: the command line.

Exit status: 0 done; 1 our fault (or a failed verification); 2 the user's mistake; 130 interrupted.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from longlive_jax.cli import (
    ablate,
    checkpoints,
    config,
    generate,
    info,
    interactive,
    quantize,
    report,
    serve,
    train,
    vbench,
)
from longlive_jax.cli.common import Parser
from longlive_jax.errors import UserError

_DESCRIPTION = """\
Long videos from text, generated block by block as a stream, in JAX.

First steps:
  longlive setup longlive-1.3b checkpoints/longlive-1.3b     fetch and convert the published model
  longlive generate --checkpoint checkpoints/longlive-1.3b --prompt "A red fox runs through snow."
"""

_EPILOG = "`longlive COMMAND --help` explains a command and shows examples."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words after `longlive`; None takes them from the process.

    Returns:
      The exit status.
    """
    try:
        parsed = build_parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int | None] = parsed.run
        status = command(parsed) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `longlive inspect x | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as end:  # argparse after --help and --version
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        print(
            "error: this is a fault in longlive-jax, not in what you typed; please report it with the lines "
            "above and the output of `longlive version`",
            file=sys.stderr,
        )
        return 1


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(prog="longlive", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action=info.VersionAction, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add_command(commands)
    interactive.add_command(commands)
    serve.add_command(commands)
    checkpoints.add_commands(commands)
    quantize.add_command(commands)
    train.add_command(commands)
    ablate.add_command(commands)
    report.add_command(commands)
    vbench.add_command(commands)
    config.add_command(commands)
    info.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
