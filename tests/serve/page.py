"""The studio's page in a real browser."""

import base64
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.serve import drawn
from tests.serve.drawn import RED

_PIXELS = """
const canvas = document.getElementById(arguments[0]);
const {width, height} = canvas;
const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
return [width, height, btoa(String.fromCharCode(...data))];
"""


class Page:
    """One browser on a studio."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def go(self, address: str) -> None:
        self.driver.get(address)

    def script(self, text: str, *arguments):
        return self.driver.execute_script(text, *arguments)

    def one(self, selector: str):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        """Clicks what can be seen, after scrolling to it."""
        element = wait_for(lambda: (found := self.one(selector)).is_enabled() and found)
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, *keys: str) -> None:
        """Keys for the page, wherever the focus is not in a field."""
        from selenium.webdriver import ActionChains

        self.script("document.activeElement.blur()")
        ActionChains(self.driver).send_keys(*keys).perform()

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        wait_for(lambda: self.one(selector).is_enabled())
        self.one(selector).send_keys(text, Keys.ENTER)

    def open(self, address: str, prompt: str = RED) -> None:
        """Opens a session and waits for its picture."""
        self.go(address)
        wait_for(lambda: self.one("#first").is_displayed())
        self.type("#first", prompt)
        wait_for(lambda: self.studio("painted") > 3)

    def studio(self, name: str):
        """A number the page keeps."""
        return self.script("return window.studio[arguments[0]]", name)

    def pixels(self, canvas: str = "screen-0") -> np.ndarray:
        """What a canvas shows, uint8 [Y, X, 3]."""
        width, height, data = self.script(_PIXELS, canvas)
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]

    def colour(self, canvas: str = "screen-0") -> str:
        """The colour of the sprite on a canvas."""
        return drawn.colour_of(self.pixels(canvas))

    def shows(self, colour: str, canvas: str = "screen-0") -> bool:
        return wait_for(lambda: self.colour(canvas) == colour)


def wait_for(condition: Callable[[], Any], *, seconds: float = 20.0) -> Any:
    """Polls until a condition holds, and returns what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found
