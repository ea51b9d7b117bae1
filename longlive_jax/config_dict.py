"""Configs as dictionaries, and changes to them by dotted names: checked against their types."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from longlive_jax.errors import UserError

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-ready copy of a config (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def from_dict(cls: type[C], values: Mapping[str, Any], *, where: str = "") -> C:
    """Builds a config from a dictionary, refusing unknown names, missing names and wrong types.

    Args:
      cls: a config dataclass.
      values: names to values; nested configs are dictionaries.
      where: dotted prefix used in error messages.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or cls.__name__} must be a table of settings, not {values!r}")
    hints = _hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise UserError(
                f"{_join(where, name)} is not a setting; {where or cls.__name__} has {', '.join(known)}"
            )
    for name, field in known.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{_join(where, name)} is missing")
    return cls(**{name: _typed(hints[name], value, _join(where, name)) for name, value in values.items()})


def override(config: C, changes: Mapping[str, Any]) -> C:
    """Returns `config` with dotted names replaced, e.g. `{"window.sink_frames": 0}`.

    Values may be strings (as typed on a command line) or of the field's own type. All changes are
    made together: only the result has to make sense, not the steps on the way there.
    """
    nested = _Changes()
    for path, value in changes.items():
        _check_setting(config, path)
        *sections, name = path.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, _Changes())
            if not isinstance(table, _Changes):
                raise UserError(f"{path} and {section} are both given; give one of them")
        table[name] = value
    return _replaced(config, nested, where="")


class _Changes(dict[str, Any]):
    """New values of some settings of one config (unlike a plain dictionary, which is a value)."""


def _check_setting(config: Any, path: str) -> None:
    for name in path.split("."):
        names = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
        if name not in names:
            raise UserError(f"{path}: {name!r} is not a setting; choose one of {', '.join(names) or 'none'}")
        config = getattr(config, name)


def _replaced(config: Any, changes: _Changes, *, where: str) -> Any:
    hints, values = _hints(type(config)), {}
    for name, value in changes.items():
        path = _join(where, name)
        if isinstance(value, _Changes):
            values[name] = _replaced(getattr(config, name), value, where=path)
        else:
            values[name] = _typed(hints[name], _parse(value, hints[name]), path)
    return dataclasses.replace(config, **values)


def _parse(value: Any, hint: Any) -> Any:
    """Turns command-line text into a plain value where the field is not itself text."""
    if not isinstance(value, str):
        return value
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return [_parse(part, item) for part in value.strip("()[] ").replace(" ", "").split(",") if part]
    if hint is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint in (int, float):
        try:
            return hint(value)
        except ValueError:
            return value  # _typed names the field in its error
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where=where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}={value!r} must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}={value!r} must be a list")
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise UserError(f"{where}={value!r} must have {len(arguments)} entries")
        return tuple(_typed(arguments[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}={value!r} must be of type {hint.__name__}")
    return value


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
