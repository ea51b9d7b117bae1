"""The tiny checkpoint and the command runner of the tests of the command line."""

from tests.cli.conftest import cache_dir, longlive, refused, tiny  # noqa: F401
