"""Where things are kept between runs."""

import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from longlive_jax.cli import options
from longlive_jax.user_cache import user_cache_dir

HOME = pathlib.Path.home()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, HOME / ".cache/longlive-jax"),
        ("linux", {"XDG_CACHE_HOME": "/scratch/me"}, pathlib.Path("/scratch/me/longlive-jax")),
        ("darwin", {}, HOME / "Library/Caches/longlive-jax"),
        ("win32", {"LOCALAPPDATA": "/appdata"}, pathlib.Path("/appdata/longlive-jax/Cache")),
        ("win32", {}, HOME / "AppData/Local/longlive-jax/Cache"),
        ("linux", {"LONGLIVE_CACHE": "~/elsewhere", "XDG_CACHE_HOME": "/x"}, HOME / "elsewhere"),
    ],
)
def test_every_platform_has_its_place(platform, variables, expected):
    assert user_cache_dir(platform, variables) == expected


@pytest.fixture
def jax_settings():
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_are_kept_however_small(tmp_path, monkeypatch, jax_settings):
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path))
    assert options.enable_compile_cache() is False
    compilation_cache.reset_cache()  # of another folder, if another test has used one
    jax.jit(lambda x: x * 3 + 1)(2.0)
    assert any((tmp_path / "xla").iterdir())
    assert options.enable_compile_cache() is True
