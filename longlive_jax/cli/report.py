"""`longlive report`: a study, a run or generated videos as one HTML page."""

import argparse
import pathlib
from typing import Any

_DESCRIPTION = """\
Make one self-contained HTML page of a study (`longlive ablate`), a training run (`longlive train`) or a
folder of generated videos: videos side by side that play together, figures, numbers, and the settings
that differ.
"""
_EXAMPLES = """\
examples:
  longlive report outputs/window_sink
  longlive report runs/toy/init runs/toy/long --out compared.html
  longlive report outputs
"""


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report", help="make an HTML page with videos and plots", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folder of a study, of a run, or of videos")
    parser.add_argument(
        "--out", metavar="FILE.html", help="the page (default: report.html in the first folder)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from longlive_jax.experiments import page

    out = arguments.out or pathlib.Path(arguments.folders[0]) / "report.html"
    print(page.write(arguments.folders, out))
