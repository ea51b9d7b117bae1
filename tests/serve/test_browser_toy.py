"""The whole product in Chromium: `longlive serve` with the bundled toy model, read off the page."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from longlive_jax.toy import measure
from longlive_jax.toy.world import BACKGROUND, COLOUR, VALUES, World
from tests.serve.page import Page, wait_for

pytestmark = pytest.mark.slow
_RUN = "from longlive_jax.cli.main import main; raise SystemExit(main())"
FIRST = "a red square staying still on a dark background"
NEXT = "a blue square staying still on a light background"


@pytest.fixture(autouse=True)
def drawn_sessions():
    """Here the model runs."""


@pytest.fixture
def address():
    """Of the command, which runs in a process of its own."""
    words = [sys.executable, "-c", _RUN, "serve", "--checkpoint", "toy", "--port", "0"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")))
        reader.start()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            line = wait_for(
                lambda: next((text for text in said if "the studio is open" in text), ""), seconds=120
            )
            yield line.split(": ", 1)[1].strip()
        finally:
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn closes down, then dies of the signal
            reader.join()


def seen(page: Page) -> tuple[str, str]:
    """The sprite's colour and the background on the page, by the toy's measurement."""
    picture = page.pixels()[None, None] / 127.5 - 1
    codes = measure.read(World(), picture.astype("float32")).codes[0, 0]
    return tuple(
        VALUES[name][codes[index]] for name, index in (("colour", COLOUR), ("background", BACKGROUND))
    )


def test_the_toy_model_follows_what_is_typed(page, address):
    page.go(address)
    wait_for(lambda: page.one("#first").is_displayed())
    page.type("#first", FIRST)
    wait_for(lambda: page.studio("painted") > 12, seconds=180)  # compiles first
    wait_for(lambda: seen(page) == ("red", "dark"))
    page.type("#prompt", NEXT)
    wait_for(lambda: seen(page) == ("blue", "light"), seconds=120)
    wait_for(lambda: page.text("#latency").endswith(" s"), seconds=60)
    painted = page.studio("painted")
    wait_for(lambda: page.studio("painted") > painted + 24, seconds=60)
    assert seen(page) == ("blue", "light")
    assert page.studio("missed") == 0
