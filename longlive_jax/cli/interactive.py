"""`longlive interactive`: a video that runs while you type what it shows."""

import argparse
import contextlib
import io
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from longlive_jax import video as video_lib
from longlive_jax.cli import live, options, outputs
from longlive_jax.cli.common import Interruption, note, setting
from longlive_jax.cli.progress import LiveStatus
from longlive_jax.errors import UserError, require

if TYPE_CHECKING:
    from longlive_jax.session import Session

_DESCRIPTION = """\
Run a video without an end and type what it shows next. It is written while it runs; Ctrl-C, /quit or
the end of the input finish it. Beside it a session file records what was asked for and when:
`longlive interactive --replay x.session.json` makes the same frames again.

Every line is a prompt, or one of

  @10s PROMPT      the prompt from that second on (@40: from that latent frame on)
  /policy NAME     what later prompts do to the cache: recache, keep, clear, flush, cut
  /blend 2s        how long the way to later prompts takes (0: none)
  /seed N          other noise
  /set NAME=VALUE  another window, sampler or switch setting
  /pause, /resume, /quit

Lines of a pipe are taken one block after the other, so that each prompt is seen.
"""
_EXAMPLES = """\
examples:
  longlive interactive --checkpoint checkpoints/longlive-1.3b --out live.mp4
  (echo "a red circle moves right"; sleep 5; echo "a blue square moves up"; sleep 5) |
      longlive interactive --checkpoint toy --out live.mp4
  printf 'a fox runs\\n@5s it stops\\n' | longlive interactive --checkpoint toy --seconds 10
"""
_BESIDE_REPLAY = frozenset(
    ("replay", "checkpoint", "out", "overwrite", "text_device", "compile_cache", "quiet", "settings")
)


def add_command(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "interactive", help="type prompts while the video runs", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    what = parser.add_argument_group("what to generate")
    what.add_argument("--checkpoint", metavar="DIR", help="as for `longlive generate`")
    what.add_argument("--prompt", metavar="TEXT", help="the first prompt (default: the first line)")
    what.add_argument("--seconds", type=float, metavar="S", help="end after so long (default: never)")
    what.add_argument("--height", type=int, metavar="PIXELS", help="rows (default: the checkpoint's)")
    what.add_argument("--width", type=int, metavar="PIXELS", help="columns (default: the checkpoint's)")
    what.add_argument("--seed", type=int, metavar="N", help="seed (default: 0)")
    what.add_argument("--replay", metavar="FILE.session.json", help="make a recorded session's frames again")
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--out", metavar="PATH", help=".mp4, .gif or a folder ending in / (default: outputs/live-<seed>.mp4)"
    )
    where.add_argument("--overwrite", action="store_true", default=None, help="replace existing files")
    options.add_how(
        parser.add_argument_group(
            "how (defaults: as the checkpoint says, but --rope relative: it has no end)"
        )
    )
    options.add_machine(parser.add_argument_group("machine"))
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks everything that can be checked, loads the model, and runs until somebody ends it."""
    _check_arguments(arguments)
    out = arguments.out or f"outputs/live-{arguments.seed or 0}.mp4"
    record = pathlib.Path(out).with_suffix(".session.json")
    outputs.check_free([out] if arguments.replay else [out, record], overwrite=bool(arguments.overwrite))
    if arguments.out is None:
        pathlib.Path(out).parent.mkdir(exist_ok=True)
    options.enable_compile_cache(arguments.compile_cache)
    status = LiveStatus(is_quiet=bool(arguments.quiet))
    with Interruption() as interruption, options.device_memory():
        try:
            with _opened(arguments, status) as session, _writer(out, session) as writer:
                lines = None if arguments.replay else _Lines(session, status, has_end=bool(arguments.seconds))
                _write(session, writer, status, interruption, lines)
                with interruption.shield():
                    if writer.count and not arguments.replay:
                        session.save(record)
        except KeyboardInterrupt:
            return 130  # before there was a video
    if not writer.count:
        note(f"ended before the first block was finished; {out} was not written")
        return 130
    rate = f", {status.fps:.1f} frames/s" if status.fps else ""
    seconds = writer.count / writer.fps
    print(
        f"{out}  ({writer.count} frames, {seconds:.2f} s, {writer.width}x{writer.height}{rate})", flush=True
    )
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    given = {name for name, value in vars(arguments).items() if value not in (None, []) and name != "parser"}
    if arguments.replay:
        extra = sorted(name.replace("_", "-") for name in given - _BESIDE_REPLAY - {"run"})
        extra += ["set"] if arguments.settings else []
        require(not extra, f"--replay says everything about the video; leave --{', --'.join(extra)} out")
    else:
        require(bool(arguments.checkpoint), "--checkpoint is missing; make one with `longlive setup`")
    for name in ("seconds", "height", "width", "fps"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name}={value} must be positive")
    if arguments.out:
        video_lib.video_suffix(arguments.out)


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace, status: LiveStatus) -> Iterator["Session"]:
    """Loads the model and begins the session, or the replay of one."""
    from longlive_jax.inference import story as stories_lib
    from longlive_jax.session import Recording, Session
    from longlive_jax.session.turn import check_start

    if arguments.replay:
        status.stage(f"loading {arguments.replay}")
        for remark in Recording.read(arguments.replay).remarks():
            note(f"warning: {remark}; frames may differ by rounding")
        pipe = None if not arguments.checkpoint else live.load(arguments, {})
        with Session.load(arguments.replay, pipe) as session:
            session.limit = session.recorded_blocks
            yield session
        return
    overrides = live.settings(arguments)
    checkpoint, config = live.open_config(arguments, overrides)
    blocks = None
    if arguments.seconds:
        frames = stories_lib.frames_from_seconds(arguments.seconds, vae=config.vae, fps=config.video.fps)
        blocks = -(-frames // config.window.block_frames)
    prompt = arguments.prompt or _first_line(status)
    start = {"seed": arguments.seed or 0, "height": arguments.height, "width": arguments.width}
    check_start(config, prompt, **start)
    status.stage(f"loading {checkpoint.path}")
    with Session(live.load(arguments, overrides), prompt, **start, blocks=blocks) as session:
        status.stage("compiling (slow the first time)")
        yield session


def _writer(out: str, session: "Session") -> video_lib.VideoWriter:
    return video_lib.open_writer(out, fps=session.config.video.fps, **session.size)


def _write(
    session: "Session",
    writer: video_lib.VideoWriter,
    status: LiveStatus,
    interruption: Interruption,
    lines: "_Lines | None",
) -> None:
    """Writes blocks until the session ends; an interruption and a failure leave what there is."""
    from longlive_jax.session import SessionError

    if lines is not None:
        lines.start()
    try:
        for index, frames, info in session:
            with interruption.shield():
                writer.write(frames)
                seconds = (index + len(frames)) / writer.fps
                status.show(info.prompt, len(frames), seconds=seconds, interval=info.timings.interval)
    except KeyboardInterrupt:
        session.stop()
    except SessionError:
        writer.close()  # what there is can be watched
        raise
    finally:
        status.end()


class _Lines:
    """Reads lines in a thread of its own and passes them on to a session."""

    def __init__(self, session: "Session", status: LiveStatus, *, has_end: bool) -> None:
        self._session, self._status, self._has_end = session, status, has_end
        self._how: dict[str, Any] = {}
        self._is_typed = sys.stdin.isatty()

    def start(self) -> None:
        """Begins to read."""
        if self._is_typed:
            self._status.ask()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in _standard_input():
            try:
                self._take(line.strip())
            except UserError as error:
                note(f"error: {error}")
            if self._is_typed:
                self._status.ask()
            elif not self._session.is_paused:
                self._session.settle()  # so that the next line does not replace this one
        if self._is_typed or not self._has_end:
            self._session.settle(include_scheduled=not self._is_typed)
            self._session.stop()

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            commands: dict[str, Callable[[str], None]] = {
                "policy": self._set_policy,
                "blend": self._set_blend,
                "seed": self._set_seed,
                "set": self._set_setting,
                "pause": lambda _: self._session.pause(),
                "resume": lambda _: self._session.resume(),
                "quit": lambda _: self._session.stop(),
            }
            if name not in commands:
                raise UserError(f"/{name} is not known; there are /{', /'.join(commands)}")
            commands[name](value.strip())
        elif line.startswith("@"):
            at, _, prompt = line[1:].partition(" ")
            self._session.switch(prompt.strip(), at=at, **self._how)
        elif line:
            self._session.switch(line, **self._how)

    def _set_policy(self, value: str) -> None:
        from longlive_jax.inference.story import check_switch

        check_switch("any", policy=value)
        self._how["policy"] = value

    def _set_blend(self, value: str) -> None:
        from longlive_jax.inference.story import time_of

        time_of(value)
        self._how["blend"] = value

    def _set_seed(self, value: str) -> None:
        require(value.isdigit(), f"/seed {value}: must be a whole number")
        self._session.change(seed=int(value))

    def _set_setting(self, value: str) -> None:
        try:
            self._session.change(dict([setting(value)]))
        except argparse.ArgumentTypeError as error:
            raise UserError(str(error)) from error


def _first_line(status: LiveStatus) -> str:
    if sys.stdin.isatty():
        status.ask()
    prompt = next((line.strip() for line in _standard_input() if line.strip()), None)
    if prompt is None:
        raise UserError("there is no prompt; type one, or give --prompt")
    return prompt


def _standard_input() -> Iterator[str]:
    """Lines of standard input as they come.

    Read without a buffer: a thread that waits in a buffered read holds a lock that the interpreter needs
    to exit, and what is read ahead would be lost to the next reader.
    """
    stdin: TextIO = sys.stdin
    try:
        number = stdin.fileno()
    except (OSError, ValueError):  # not a file, as in tests
        yield from iter(stdin.readline, "")
        return
    with io.FileIO(number, closefd=False) as raw:
        while line := raw.readline():
            yield line.decode("utf-8", errors="replace")
