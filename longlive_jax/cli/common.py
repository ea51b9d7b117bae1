"""What the subcommands share: a parser with one-line errors, value types, and interruption."""

import argparse
import contextlib
import difflib
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Self

from longlive_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError with one line, and suggests what was meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        # An abbreviation that works today breaks scripts the day another option begins with it.
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        parser = getattr(parsed, "parser", self)
        if isinstance(parser.get_default("settings"), tuple):
            # argparse takes NAME=VALUE words only where they stand together, before any option.
            words = [word for word in unknown if "=" in word and not word.startswith("-")]
            parsed.settings = [*parsed.settings, *(setting(word) for word in words)]
            unknown = [word for word in unknown if word not in words]
        if unknown:
            parser.error(f"{unknown[0]} is not known here{parser.suggestion(unknown[0])}")
        return parsed

    def suggestion(self, argument: str) -> str:
        """ ", did you mean --x?" for a mistyped option, else nothing."""
        name = argument.split("=")[0]
        close = difflib.get_close_matches(name, list(self._option_string_actions), n=1)
        return f", did you mean {close[0]}?" if close else ""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples; leaves room for option names."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **({"max_help_position": 30, "width": 100} | options))

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets how far commands are indented, and breaks the line of the longest.
            self._action_max_length += self._indent_increment


def setting(text: str) -> tuple[str, str]:
    """Parses `dotted.name=value`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} must be dotted.name=value, as in window.sink_frames=0")
    return name.strip(), value.strip()


def add_settings(group: Any) -> None:
    """Adds `--set`, which takes any setting of the config."""
    group.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        type=setting,
        action="append",
        default=[],
        help="change any setting of the config by its dotted name, e.g. sampler.shift=8 (repeatable; the "
        "error for a wrong name lists the right ones)",
    )


class Interruption:
    """Turns Ctrl-C and SIGTERM into one KeyboardInterrupt, outside of the places that must not be cut.

    Within the context the first signal raises KeyboardInterrupt, or waits for the end of a `shield`;
    later ones are ignored while what is open is being finished.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._is_shielded = self._is_pending = self._has_fired = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Holds a signal back until the body is through."""
        self._is_shielded = True
        try:
            yield
        finally:
            self._is_shielded = False
        if self._is_pending:
            self._fire()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._is_shielded:
            self._is_pending = True
        elif not self._has_fired:
            self._fire()

    def _fire(self) -> NoReturn:
        self._has_fired, self._is_pending = True, False
        raise KeyboardInterrupt


def note(message: str) -> None:
    """Prints a remark for the person at the terminal; results go to standard output."""
    print(message, file=sys.stderr, flush=True)
