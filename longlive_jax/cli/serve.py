"""`longlive serve`: the studio, a web page that directs a video while it is made."""

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from longlive_jax.cli import live, options
from longlive_jax.cli.common import note
from longlive_jax.errors import UserError, require

if TYPE_CHECKING:
    from longlive_jax.serve.settings import ServeConfig

_DESCRIPTION = """\
Open the studio: a page on this machine that plays a video while it is made. Type a prompt and it follows;
scrub, rewind and branch; compare two settings side by side; download the MP4 and the session file.

It listens on 127.0.0.1. With another --host it asks every browser for a token, which is made and printed
unless --token gives one. There is no encryption: beyond a network you trust, put a TLS proxy in front.
"""
_EXAMPLES = """\
examples:
  longlive serve --checkpoint toy
  longlive serve --checkpoint checkpoints/longlive-1.3b --port 9000 --sessions 2
  longlive serve --checkpoint checkpoints/longlive-1.3b --host 0.0.0.0 --allow-host studio.example.org
"""
_NEEDED = ("starlette", "uvicorn", "websockets")
# Options of the command and the settings they stand for.
_SETTINGS = {
    "host": "host",
    "port": "port",
    "token": "token",
    "sessions": "sessions",
    "viewers": "sockets",
    "queue": "waiting",
    "grace": "grace_seconds",
    "idle": "idle_seconds",
    "pace": "pace",
    "snapshots": "snapshots",
    "snapshot_place": "snapshot_place",
    "warm_up": "warms_up",
}


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve", help="direct a video in the browser", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="as for `longlive generate`")
    where = parser.add_argument_group("where it listens")
    where.add_argument("--host", metavar="ADDRESS", help="address (default: 127.0.0.1)")
    where.add_argument("--port", type=int, metavar="N", help="port (default: 8765; 0: any free one)")
    where.add_argument("--token", metavar="TEXT", help="what browsers have to present")
    where.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="another host name of this server, as behind a proxy (repeatable)",
    )  # fmt: skip
    who = parser.add_argument_group("how many")
    who.add_argument("--sessions", type=int, metavar="N", help="videos at a time (default: 1)")
    who.add_argument("--viewers", type=int, metavar="N", help="browsers at a time (default: 64)")
    who.add_argument("--queue", type=int, metavar="N", help="browsers that may wait (default: 32)")
    who.add_argument(
        "--grace", type=float, metavar="S", help="seconds a lost browser keeps its place (default: 20)"
    )
    who.add_argument(
        "--idle", type=float, metavar="S",
        help="a session nobody directs for so long ends when others wait (default: 300)",
    )  # fmt: skip
    what = parser.add_argument_group("what it keeps")
    what.add_argument(
        "--history-mb", type=int, metavar="N", help="disk for a session's frames (default: 512)"
    )
    what.add_argument(
        "--snapshots", type=int, metavar="N", help="states to rewind to (default: 256 MB of them, at least 2)"
    )
    what.add_argument("--snapshot-place", choices=("device", "host"), help="where they lie (default: device)")
    options.add_how(parser.add_argument_group("how (defaults: as the checkpoint says, but --rope relative)"))
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--pace", choices=("real", "free"), help="begin at the video's rate, or as fast as it goes"
    )
    machine.add_argument(
        "--warm-up", action=argparse.BooleanOptionalAction,
        help="compile prompt switches in the background (default: yes)",
    )  # fmt: skip
    options.add_machine(machine)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks everything that can be checked, takes the port, loads the model, and serves."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    require(not missing, f"{', '.join(missing)} is missing; pip install 'longlive-jax[serve]'")
    from longlive_jax.serve import server
    from longlive_jax.session.turn import check_start

    config = serve_config(arguments)
    require(bool(arguments.checkpoint), "--checkpoint is missing; make one with `longlive setup`")
    overrides = live.settings(arguments)
    checkpoint, model = live.open_config(arguments, overrides)
    check_start(model, "a prompt", seed=0, height=None, width=None)
    with server.bind(config) as taken, options.device_memory():
        options.enable_compile_cache(arguments.compile_cache)
        if not arguments.quiet:
            note(f"loading {checkpoint.path}")
        pipe = live.load(arguments, overrides)
        place = server.address(config, taken.getsockname()[1])
        server.run(pipe, config, taken, lambda: print(f"the studio is open: {place}", flush=True))
    return 0


def serve_config(arguments: argparse.Namespace) -> "ServeConfig":
    """The settings a command line stands for.

    Raises:
      UserError: one does not fit.
    """
    from longlive_jax.serve import settings

    given = {
        name: getattr(arguments, option)
        for option, name in _SETTINGS.items()
        if getattr(arguments, option) is not None
    }
    if arguments.history_mb is not None:
        given["history_bytes"] = arguments.history_mb << 20
    host = given.get("host", settings.ServeConfig.host)
    if "token" not in given and not settings.is_loopback(host):
        given["token"] = settings.new_token()
    if given.get("token") == "":
        raise UserError("--token is empty; give at least 16 characters, or leave it out")
    return settings.ServeConfig(allowed_hosts=tuple(arguments.allow_host), **given)
