"""`longlive serve`: what its options stand for, and what it refuses before anything is loaded."""

import re

import pytest

from longlive_jax.cli import serve
from longlive_jax.cli.main import build_parser, main
from longlive_jax.errors import UserError
from longlive_jax.serve import server
from longlive_jax.serve.settings import ServeConfig


def config_of(*words: str) -> ServeConfig:
    return serve.serve_config(build_parser().parse_args(["serve", "--checkpoint", "x", *words]))


def test_defaults_are_those_of_the_settings():
    assert config_of() == ServeConfig()
    assert ServeConfig().host == "127.0.0.1"


def test_options_are_settings():
    words = "--port 9000 --sessions 2 --viewers 9 --queue 3 --grace 5 --idle 60 --history-mb 64 --snapshots 4"
    more = "--snapshot-place host --pace free --no-warm-up --allow-host a.example --allow-host b.example"
    assert config_of(*words.split(), *more.split()) == ServeConfig(
        port=9000, sessions=2, sockets=9, waiting=3, grace_seconds=5.0, idle_seconds=60.0,
        history_bytes=64 << 20, snapshots=4, snapshot_place="host", pace="free", warms_up=False,
        allowed_hosts=("a.example", "b.example"),
    )  # fmt: skip


def test_another_address_has_a_token():
    made = config_of("--host", "0.0.0.0")
    assert len(made.token) >= 32
    assert server.address(made, 80).endswith(f":80/?token={made.token}")
    assert config_of("--host", "::1").token == ""
    assert server.address(config_of("--host", "::1"), 80) == "http://[::1]:80/"
    assert config_of("--token", "sixteen characters").token == "sixteen characters"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--token", "short"), "token has 5 characters"),
        (("--token", ""), "--token is empty"),
        (("--sessions", "0"), "sessions=0 must be positive"),
        (("--snapshots", "-1"), "snapshots=-1 must be 0 or more"),
        (("--port", "70000"), "port=70000"),
    ],
)
def test_what_does_not_fit_is_refused(words, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        config_of(*words)


def test_a_missing_checkpoint_and_missing_packages_are_said(capsys, monkeypatch):
    assert main(["serve"]) == 2
    assert "--checkpoint is missing" in capsys.readouterr().err
    monkeypatch.setattr(serve, "_NEEDED", ("a_package_that_is_not_there",))
    assert main(["serve", "--checkpoint", "x"]) == 2
    assert "pip install 'longlive-jax[serve]'" in capsys.readouterr().err
