"""The page in Chromium: what a person does, and what the toy's measurement reads off the canvas."""

import dataclasses
import json
import time

import pytest

from longlive_jax.video import read_video
from tests.serve import drawn
from tests.serve.conftest import CONFIG, served
from tests.serve.drawn import BLUE, GREEN, RED, DrawnSession
from tests.serve.page import wait_for

pytestmark = pytest.mark.slow
_TOKEN = "a token of the tests"


@pytest.fixture
def studio(monkeypatch):
    monkeypatch.setattr(DrawnSession, "seconds", 0.05)
    with served(dataclasses.replace(CONFIG, port=0, pace="real", grace_seconds=3.0)) as running:
        yield running


def choose(page, selector, text):
    from selenium.webdriver.support.select import Select

    Select(page.one(selector)).select_by_visible_text(text)


def test_a_typed_prompt_changes_the_picture(page, studio):
    page.open(studio.address)
    assert page.shows("red")
    assert page.text("#badge") == "LIVE"
    page.type("#prompt", BLUE)
    assert page.shows("blue")
    wait_for(lambda: page.text("#latency").endswith(" s"))
    assert 0 < float(page.text("#latency").split()[0]) < 10
    wait_for(lambda: page.text("#fps")[0].isdigit() and float(page.text("#fps")) > 5)
    assert page.one("#caption").text == BLUE
    suggestions = wait_for(
        lambda: page.script("return [...document.querySelectorAll('#next button')].map(b => b.textContent)")
    )
    page.click("#next button")
    wait_for(lambda: page.text("#caption") == suggestions[0])
    assert page.studio("missed") == 0


def test_scrub_play_and_branch_by_mouse(page, studio):
    from selenium.webdriver import ActionChains

    page.open(studio.address)
    page.type("#prompt", BLUE)
    assert page.shows("blue")
    wait_for(lambda: int(page.one("#track").get_attribute("aria-valuemax")) >= 6)
    track = page.one("#track")
    ActionChains(page.driver).move_to_element_with_offset(
        track, 10 - track.size["width"] // 2, -20
    ).click().perform()
    wait_for(lambda: page.text("#badge") == "REPLAY")
    assert page.shows("red")
    thumbs = page.script(
        "return [...document.querySelectorAll('#thumbs img')].filter(i => i.naturalWidth).length"
    )
    assert thumbs >= 3
    page.click("#play")  # the past plays
    begin = page.text("#clock")
    wait_for(lambda: page.text("#clock") != begin)
    page.click("#play")
    page.type("#prompt", GREEN)
    wait_for(lambda: page.text("#badge") == "LIVE")
    assert page.shows("green")
    assert page.script("return [...document.querySelectorAll('#takes button')].map(b => b.textContent)") == [
        "Take 1",
        "Take 2",
    ]
    page.click("#takes button")  # the first take is still there
    assert page.shows("blue")
    page.click("#branch")
    wait_for(lambda: page.text("#badge") == "LIVE")
    assert page.shows("blue")


def test_everything_goes_by_keyboard(page, studio):
    from selenium.webdriver.common.keys import Keys

    page.go(studio.address)
    wait_for(lambda: page.one("#first").is_displayed())
    page.press("/")
    page.driver.switch_to.active_element.send_keys(RED, Keys.ENTER)
    wait_for(lambda: page.studio("painted") > 3)
    page.press("/")
    page.driver.switch_to.active_element.send_keys(BLUE, Keys.ENTER)
    assert page.shows("blue")
    page.press(" ")
    wait_for(lambda: page.text("#badge") == "PAUSED")
    page.press(Keys.HOME)
    wait_for(lambda: page.text("#badge") == "REPLAY")
    assert page.shows("red")
    assert page.text("#clock") == "0:00.0"
    page.press(Keys.ARROW_RIGHT)
    wait_for(lambda: page.text("#clock") == "0:00.1")
    page.press("l")
    wait_for(lambda: page.text("#badge") == "PAUSED")
    page.press(" ")
    wait_for(lambda: page.text("#badge") == "LIVE")
    page.press("4")
    wait_for(lambda: page.one("[data-policy=flush]").get_attribute("aria-checked") == "true")
    page.press("?")
    assert page.one("#keys").is_displayed()
    page.press(Keys.ESCAPE)
    wait_for(lambda: not page.one("#keys").is_displayed())


def test_two_sides_are_shown_and_one_is_kept(page, studio):
    page.open(studio.address)
    page.one("#prompt").send_keys(BLUE)
    page.click("#compare")
    wait_for(lambda: page.one("#screen-2").is_displayed())
    assert [page.text(f"#side-{side}") for side in (1, 2)] == ["recache", "keep"]
    page.shows("blue", "screen-1")
    page.shows("blue", "screen-2")
    page.click("[data-side=right]")
    wait_for(lambda: page.one("#screen-0").is_displayed())
    assert page.shows("blue")
    wait_for(lambda: page.one("[data-policy=keep]").get_attribute("aria-checked") == "true")


def test_the_first_block_may_have_steps_of_its_own(page, studio):
    page.go(studio.address)
    wait_for(lambda: page.one("#first").is_displayed())
    page.click("details.more summary")
    choose(page, "#first-steps", "16 steps")
    page.type("#first", RED)
    wait_for(lambda: page.text("#steps-value").endswith("; first block 16)"))
    assert "8 steps in the first block" not in page.text("#left"), "the first block is made"
    choose(page, "#origin", "the beginning")
    choose(page, "#left", "8 steps in the first block")
    choose(page, "#right", "4 steps in the first block")
    page.click("#compare")
    wait_for(lambda: page.one("#screen-2").is_displayed())
    assert [page.text(f"#side-{side}") for side in (1, 2)] == ["opening steps 8", "opening steps 4"]


def test_downloads_arrive(page, studio, downloads):
    page.open(studio.address)
    page.type("#prompt", BLUE)
    assert page.shows("blue")
    wait_for(lambda: int(page.one("#track").get_attribute("aria-valuemax")) >= 5)
    page.click("#mp4")
    path = wait_for(lambda: next(iter(downloads.glob("*.mp4")), None))
    frames = read_video(path)
    assert (drawn.colour_of(frames[0]), drawn.colour_of(frames[-1])) == ("red", "blue")
    page.click("#file")
    path = wait_for(lambda: next(iter(downloads.glob("*.json")), None))
    assert [event["prompt"] for event in json.loads(path.read_text())["events"]] == [BLUE]
    page.one("#upload").send_keys(str(path))
    wait_for(lambda: "Session file" in page.text("#takes"))
    page.shows("red")
    page.shows("blue")


def test_a_dropped_socket_comes_back(page, studio):
    page.open(studio.address)
    room = page.script("return location.hash")
    page.script("window.studio.drop()")
    wait_for(lambda: page.one("#link").get_attribute("class") == "dot off")
    wait_for(lambda: page.one("#link").get_attribute("class") == "dot")
    painted = page.studio("painted")
    wait_for(lambda: page.studio("painted") > painted + 5)
    assert page.script("return location.hash") == room
    assert page.text("#control") == "In control"
    page.driver.refresh()  # so does the whole page
    wait_for(lambda: page.script("return window.studio?.painted ?? 0") > 5)
    assert page.script("return location.hash") == room
    assert page.text("#control") == "In control"


def test_a_closed_browser_frees_its_session(page, studio):
    page.open(studio.address)
    assert studio.lobby.counts()["sessions"] == 1
    page.go("about:blank")
    wait_for(lambda: studio.lobby.counts() == {"sessions": 0, "sockets": 0, "waiting": 0})


def test_a_failure_is_shown_and_restarts(page, studio):
    page.open(studio.address)
    DrawnSession.failing.set()
    wait_for(lambda: page.one("#restart").is_displayed())
    assert "on purpose" in page.text("#cover-text")
    DrawnSession.failing.clear()
    page.click("#restart")
    wait_for(lambda: not page.one("#cover").is_displayed())
    assert page.shows("red")


def test_a_phone_watches_and_takes_over(page, studio, start_browser):
    page.open(studio.address)
    phone = start_browser(390, 844, is_phone=True)
    phone.go(page.script("return location.href"))
    wait_for(lambda: phone.studio("painted") > 3)
    assert not phone.one("#prompt").is_enabled()
    assert phone.script("return document.documentElement.scrollWidth") <= 390
    for name in ("#screen-0", "#prompt", "#track"):
        box = phone.one(name).rect
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
        assert box["y"] + box["height"] <= 844, name
    phone.click("#control")
    wait_for(lambda: "asks for control" in page.text("#control"))
    page.click("#control")
    wait_for(lambda: phone.one("#prompt").is_enabled())
    assert not page.one("#prompt").is_enabled()
    phone.type("#prompt", GREEN)
    assert page.shows("green")
    assert phone.shows("green")


def test_the_queue_is_seen_and_moves(page, studio, start_browser):
    other = start_browser()
    page.open(studio.address)
    other.go(studio.address)
    wait_for(lambda: other.one("#rooms button").is_displayed())
    other.type("#first", GREEN)
    wait_for(lambda: "You are next" in other.text("#place"))
    page.click("#leave")
    assert other.shows("green")
    assert "off-limits" not in other.one("#ask").get_attribute("class")


def test_the_door_asks_for_the_token(page):
    config = dataclasses.replace(CONFIG, port=0, token=_TOKEN)
    with served(config) as studio:
        page.go(studio.address)
        page.type("#token", "not this one")
        wait_for(lambda: page.driver.current_url.endswith("/login"))
        time.sleep(0.2)
        page.type("#token", _TOKEN)
        wait_for(lambda: page.one("#first").is_displayed())
        page.type("#first", RED)
        assert page.shows("red")
