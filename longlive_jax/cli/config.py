"""`longlive config import`: the release's YAML configs as ours."""

import argparse
import pathlib
from typing import Any

from longlive_jax.cli.common import note
from longlive_jax.errors import UserError, require

_DESCRIPTION = "Config files: translate those of the PyTorch release."
_IMPORT = """\
Translate a YAML config of the PyTorch release into a config file of ours, for `longlive generate --config` or
`longlive train`. What cannot be translated is named, and then nothing is written. docs/configs.md lists every
field.
"""
_EXAMPLES = """\
examples:
  longlive config import longlive_inference.yaml --out my_inference.py
  longlive config import longlive_train_long.yaml --out my_long.py
  longlive config import mine.yaml                       print it
  longlive config import mine.yaml --out mine.py --partial
"""


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "config", help="translate configs of the PyTorch release", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, help="what to do")
    importer = actions.add_parser(
        "import", help="translate a release YAML", description=_IMPORT, epilog=_EXAMPLES
    )
    importer.add_argument("yaml", metavar="RELEASE.yaml", help="config of the release")
    importer.add_argument("--out", metavar="FILE.py", help="file to write (default: print it)")
    importer.add_argument(
        "--partial", action="store_true", help="translate what can be, and name the rest in the file"
    )
    importer.add_argument("--overwrite", action="store_true", help="replace an existing file")
    importer.set_defaults(run=run_import, parser=importer)


def run_import(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from longlive_jax import storage
    from longlive_jax.convert import release_config

    out = pathlib.Path(arguments.out) if arguments.out else None
    if out is not None:
        require(out.suffix == ".py", f"--out={out} must end in .py")
        require(arguments.overwrite or not out.exists(), f"--out={out} exists already; add --overwrite")
    found = release_config.translate(release_config.read_yaml(arguments.yaml))
    if found.problems and not arguments.partial:
        raise UserError(f"{arguments.yaml}: {'; '.join(found.problems)}; --partial leaves that out")
    title = f"{pathlib.Path(arguments.yaml).name} of the PyTorch release."
    text = release_config.to_source(found.config, title=title)
    if found.problems:
        lines = "".join(f"# Not translated: {problem}\n" for problem in found.problems)
        text = text.replace('"""\n\n', f'"""\n\n{lines}\n', 1)
    for name, reason in found.left_out.items():
        note(f"{name}: {reason}")
    if out is None:
        print(text, end="")
        return
    with storage.new_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(out)
