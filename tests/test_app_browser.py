"""The page in headless Chromium: drawn, changed, cancelled, refused; screenshots are kept in results/app/."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_app import eventually, save_network

import app
from page.server import PageServer

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser: make test-app")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser, which would be called {', '.join(BROWSERS)}: make test-app"
    ),
]
SCREENSHOTS = ROOT / "results" / "app"
SIZE = {"width": 1200, "height": 800}
LOCAL = re.compile(r"http://127\.0\.0\.1:\d+/|data:")
SECONDS = 180_000  # milliseconds, for a machine that does other things as well


class Outside:
    """Addresses beyond this machine that this process wanted to reach, while it is switched on."""

    def __init__(self) -> None:
        self.on, self.wanted = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or event not in ("socket.connect", "socket.getaddrinfo"):
            return
        host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0]
        if isinstance(host, (str, bytes)) and host not in ("127.0.0.1", "localhost", "::1"):
            self.wanted.append(host)


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    outside = Outside()
    outside.on = True
    yield outside
    outside.on = False


def served(folder: Path, elastic: bool) -> Iterator[PageServer]:
    """A server of a small network with random weights."""
    with app.serve(["--ckpt", str(save_network(folder, elastic)), "--port", "0"]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, outside: Outside) -> Iterator[PageServer]:
    yield from served(tmp_path_factory.mktemp("runs") / "elastic", elastic=True)


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """Of a network without elastic levels."""
    yield from served(tmp_path_factory.mktemp("runs") / "plain", elastic=False)


@pytest.fixture(scope="module")
def netlog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser") / "net.json"


@pytest.fixture(scope="module")
def browser(netlog: Path) -> Iterator[Any]:
    """Chromium that finds no host but this one, and writes down what it asks the network for."""
    flags = [f"--log-net-log={netlog}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab; requests to other hosts, errors of the page and broken promises fail the test."""
    context = browser.new_context(viewport=SIZE)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, requests, errors = context.new_page(), [], []
    page.set_default_timeout(SECONDS)
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []
    assert [url for url in requests if not LOCAL.match(url)] == []


def opened(page: Any, server: PageServer, query: str = "") -> Any:
    page.goto(server.url + query)
    page.wait_for_selector("body[data-ready]")
    return page


def draw(page: Any) -> None:
    page.click("#draw")
    page.wait_for_selector("#cancel:not([hidden])", state="attached")
    page.wait_for_selector("#draw:not([disabled])")
    assert page.is_hidden("#error"), page.text_content("#error")


def keep(page: Any, name: str) -> None:
    """Keep a screenshot of the whole page, which must show something."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    assert (SCREENSHOTS / f"{name}.png").stat().st_size > 10_000


def gmacs(page: Any) -> list[float]:
    """GMACs of the rows of costs."""
    numbers = page.locator("#costs .number:not(.head)").all_text_contents()
    return [float(text) for text in numbers[::3]]


def test_it_opens_with_the_network_and_its_costs(page: Any, server: PageServer) -> None:
    opened(page, server)
    assert server.about["source"] in page.text_content("#network")
    assert page.locator(".card").count() == page.locator(".segment").count() == 2
    assert page.locator(".card svg line").count() == (3 + 3) + (5 + 5)  # of 4x4 and 2x2 patches on 8x8 pixels
    assert page.get_attribute("#edge-0", "aria-valuenow") == "0.5"
    pyramid, finest = gmacs(page)
    assert finest > 1.2 * pyramid
    assert page.locator("#result *").count() == 0
    keep(page, "opened")


def test_a_picture_forms(page: Any, server: PageServer) -> None:
    opened(page, server)
    page.fill("#classes", "3, 1, 4")
    page.fill("#steps", "20")
    draw(page)
    assert page.locator(".film figure img").count() == 3 * 11
    times = page.locator(".film .time").all_text_contents()
    assert times[0] == "t = 0.00"
    assert times[-1] == "picture"
    assert page.locator(".film figure.done").count() == 3
    sizes = page.evaluate("[...document.querySelectorAll('img')].map((image) => [image.naturalWidth, image.width])")
    assert all(own == 8 and shown > 40 for own, shown in sizes)
    assert page.evaluate("getComputedStyle(document.querySelector('img')).imageRendering") == "pixelated"
    seconds = page.locator("#costs .number:not(.head)").all_text_contents()[2::3]
    assert float(seconds[0]) > 0
    assert seconds[1].startswith("about ")
    keep(page, "drawn")


def test_edges_move_by_mouse_and_keys(page: Any, server: PageServer) -> None:
    opened(page, server)
    before, box = gmacs(page)[0], page.locator("#axis").bounding_box()
    handle = page.locator("#edge-0")
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], middle, steps=8)
    page.mouse.up()
    playwright.expect(handle).to_have_attribute("aria-valuenow", "0.8")
    for _ in range(2):
        handle.press("ArrowRight")
    playwright.expect(handle).to_have_attribute("aria-valuenow", "0.82")
    page.wait_for_selector("#spent-0:has-text('82 evaluations')")
    assert gmacs(page)[0] < 0.85 * before
    page.click("[data-shows=link]")
    link = page.get_attribute("#code a", "href")
    assert "edges=0.82" in link
    draw(page)
    other = opened(page.context.new_page(), server, "?" + link.partition("?")[2])
    assert other.get_attribute("#edge-0", "aria-valuenow") == "0.82"
    draw(other)
    shown = "[...document.querySelectorAll('figure.done img')].map((image) => image.src)"
    assert other.evaluate(shown) == page.evaluate(shown)  # the link reproduces the pictures
    handle.dblclick()
    playwright.expect(handle).to_have_attribute("aria-valuenow", "0.5")


def test_pyramid_and_finest_level_side_by_side(page: Any, server: PageServer) -> None:
    opened(page, server, "?classes=3,1,4,1,5,9&show=finest&steps=12&edges=0.7")
    draw(page)
    boxes = [way.bounding_box() for way in page.locator(".way").all()]
    assert len(boxes) == 2
    assert boxes[0]["y"] == boxes[1]["y"]
    assert page.locator(".way figure.done").count() == 12
    assert "arithmetic" in page.text_content("#costs")
    keep(page, "beside-sit")


def test_five_budgets(page: Any, server: PageServer) -> None:
    opened(page, server, "?classes=3,1,4,1,5,9,2,6&show=budgets&steps=12")
    draw(page)
    assert page.locator(".way").count() == 5
    assert page.locator(".way figure.done").count() == 40
    costs = gmacs(page)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.5 * costs[0]
    keep(page, "budgets")


def test_wrong_input_is_a_sentence_and_goes_away(page: Any, server: PageServer) -> None:
    opened(page, server)
    page.fill("#classes", "3, 11")
    playwright.expect(page.locator("#error")).to_contain_text("the network knows 0 to 9")
    page.click("#draw")
    playwright.expect(page.locator("#error")).to_be_visible()
    assert page.locator("figure").count() == 0
    keep(page, "wrong-input")
    page.fill("#classes", "3")
    playwright.expect(page.locator("#error")).to_be_hidden()
    page.fill("#scale-1", "")
    playwright.expect(page.locator("#error")).to_contain_text("guidance")


def test_a_wrong_link_opens_the_page_with_a_sentence(page: Any, server: PageServer) -> None:
    opened(page, server, "?classes=<img src=x>")
    assert "is not a whole number" in page.text_content("#error")
    assert page.locator("#error img").count() == 0
    assert page.input_value("#classes") == "0, 1, 2, 3"


def test_what_training_did_not_show_is_told(page: Any, plain_server: PageServer) -> None:
    opened(page, plain_server, "?edges=0.7&show=finest")
    assert "4x4 patches for t from 0.5 to 0.7" in page.text_content("#notes")
    assert "times from 0.5 on" in page.text_content("#notes")
    assert page.locator("#untrained i").count() == 1
    page.check("[value=budgets]")
    playwright.expect(page.locator("#error")).to_contain_text("trained with --elastic")
    keep(page, "not-trained")


def test_a_long_drawing_is_cancelled(page: Any, server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = server.studio.timed

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return timed(*args)

    monkeypatch.setattr(server.studio, "timed", slow)
    opened(page, server, "?classes=1,2&steps=1000")
    page.click("#draw")
    page.wait_for_selector("figure img")
    assert len(server.drawings) == 1
    keep(page, "forming")
    page.click("#cancel")
    playwright.expect(page.locator("#error")).to_have_text("Cancelled.")
    assert eventually(lambda: not server.drawings)
    assert page.locator("figure.done").count() == 0
    monkeypatch.undo()
    page.fill("#steps", "4")
    draw(page)
    assert page.locator("figure.done").count() == 2


def test_a_closed_tab_ends_its_drawing(page: Any, server: PageServer) -> None:
    other = opened(page.context.new_page(), server, "?steps=1000")
    other.click("#draw")
    other.wait_for_selector("figure img")
    assert len(server.drawings) == 1
    other.close()
    assert eventually(lambda: not server.drawings)


def test_two_people_get_their_own_pictures(browser: Any, page: Any, server: PageServer) -> None:
    context = browser.new_context()
    people = [
        opened(page, server, "?classes=1,2&seed=1&steps=30"),
        opened(context.new_page(), server, "?classes=3&steps=30"),
    ]
    for person in people:
        person.click("#draw")
    for person, count in zip(people, (2, 1), strict=True):
        person.wait_for_selector("figure.done", timeout=SECONDS)
        person.wait_for_selector("#draw:not([disabled])")
        assert person.locator("figure.done").count() == count
    shown = "[...document.querySelectorAll('figure.done img')].map((image) => image.src)"
    together = [person.evaluate(shown) for person in people]
    for person in people:
        draw(person)
    assert [person.evaluate(shown) for person in people] == together
    context.close()


def test_command_and_program_are_shown_and_copied(page: Any, server: PageServer) -> None:
    opened(page, server, "?classes=3,1&seed=4")
    page.click("[data-shows=command]")
    assert page.text_content("#code").startswith("python sample.py ODE --ckpt ")
    page.click("#code button")
    playwright.expect(page.locator("#code button")).to_have_text("copied")
    assert page.evaluate("navigator.clipboard.readText()") == server.plan("classes=3,1&seed=4")["command"]
    page.click("[data-shows=python]")
    playwright.expect(page.locator("#code")).to_contain_text("pipe.images([3, 1], solver, guidance, seed=4)")
    page.fill("#seed", "5")
    playwright.expect(page.locator("#code")).to_contain_text("seed=5")
    keep(page, "python")


def test_it_fits_a_narrow_window(page: Any, server: PageServer) -> None:
    page.set_viewport_size({"width": 480, "height": 900})
    opened(page, server, "?classes=3,1&steps=12")
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 480
    keep(page, "narrow")


def test_nothing_left_this_machine(browser: Any, netlog: Path, outside: Outside) -> None:
    """The last test: it closes the browser, whose own list of requests is then complete.

    Requests of pages tell the page that they come from; Chromium's own, for updates and the like, tell none.
    """
    browser.close()
    events = [event["params"] for event in json.loads(netlog.read_text())["events"] if "params" in event]
    urls = [event["url"] for event in events if event.get("initiator", "").startswith("http")]
    assert any("/draw?" in url for url in urls)
    assert [url for url in urls if not LOCAL.match(url)] == []
    assert outside.wanted == []
