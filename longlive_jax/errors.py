"""The one exception that means "you can fix this": it becomes exit code 2 and a single line."""


class UserError(ValueError):
    """Bad input. The message is one line: the field, the value that was given, and the remedy.

    Raised before any heavy work starts; the command line prints the message without a traceback
    and exits with status 2. Everything else that escapes is our fault (status 1).
    """


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
