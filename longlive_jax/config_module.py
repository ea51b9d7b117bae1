"""Config files that are Python, modules whose `get_config()` returns the config; configs as flat tables."""

import importlib.util
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any

from longlive_jax.errors import UserError, require


def load(path: str | pathlib.Path, expected: type[Any], *, example: str) -> Any:
    """Runs a Python config file and returns what its `get_config()` does.

    Args:
      path: the file.
      expected: the type that `get_config()` must return.
      example: a config file that exists, for the error.

    Raises:
      UserError: there is no such file, it fails, or it returns something else.
    """
    return load_with_module(path, expected, example=example)[0]


def load_with_module(
    path: str | pathlib.Path, expected: type[Any], *, example: str
) -> tuple[Any, types.ModuleType]:
    """As `load`, with the module, for what else the file defines."""
    path = pathlib.Path(path)
    require(path.is_file() and path.suffix == ".py", f"config={path} is no Python file; try {example}")
    spec = importlib.util.spec_from_file_location(f"longlive_config_{path.stem}", path)
    assert spec is not None, path  # the suffix is .py
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), f"config={path} has no get_config()")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config={path} cannot be read ({type(error).__name__}: {error})") from error
    require(
        isinstance(config, expected),
        f"config={path}: get_config() must return a {public_module(expected)}.{expected.__name__}",
    )
    return config, module


def public_module(cls: type[Any]) -> str:
    """The module to import a class from: of those it is defined in or handed on by, the outermost."""
    module = cls.__module__
    while (outer := module.rpartition(".")[0]) and getattr(sys.modules[outer], cls.__name__, None) is cls:
        module = outer
    return module


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found
