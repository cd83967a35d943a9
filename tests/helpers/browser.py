"""Headless Chromium on the demo's page: for its tests, and for its screenshot in the docs."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from PIL import Image

from tinygptv_ds.apps.demo.page import HINTS, TASKS

if TYPE_CHECKING:
    from playwright.sync_api import Page, Request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium on PATH" if CHROMIUM is None else None if find_spec("playwright") else "playwright is missing"
_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no other machine can be reached
)
_TIMEOUT = 60_000  # milliseconds; a state that a busy machine takes long to reach, not a time to wait
_QUIET = 300  # milliseconds without a new request after which none is expected


@contextmanager
def visited(url: str, *, width: int = 1280, height: int = 900, scale: float = 1) -> Iterator[tuple["Page", list[str]]]:
    """Open the demo's page, ready for an image; also give the addresses of all its requests."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_TIMEOUT)
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_OPTIONS))
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.set_default_timeout(_TIMEOUT)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        page.wait_for_selector("#image input[type=file]", state="attached")
        page.wait_for_selector("#image canvas")
        try:
            yield page, requests
        finally:
            browser.close()


def upload(page: "Page", image: bytes) -> None:
    """Put a PNG into the editor, and wait until it is there."""
    file = {"name": "image.png", "mimeType": "image/png", "buffer": image}
    with another_image(page):
        page.set_input_files("#image input[type=file]", files=[file])


@contextmanager
def another_image(page: "Page") -> Iterator[None]:
    """Wait until the editor shows an image of another size, and the page and the server have exchanged all about it.

    The zoom, which the editor shows as text, has changed, and no request is under way or follows.
    """
    zoom = "() => document.querySelector('#image').innerText.match(/\\d+%/)[0]"
    before = page.evaluate(zoom)
    started: list[Request] = []
    ended: list[Request] = []

    def end(request: "Request") -> None:
        ended.append(request)

    listeners = {"request": lambda request: started.append(request), "requestfinished": end, "requestfailed": end}
    for event, listener in listeners.items():
        page.on(event, listener)
    yield
    page.wait_for_function(f"before => ({zoom})() != before", arg=before)
    seen = -1
    while seen != len(started) or any(request not in ended for request in started):
        seen = len(started)
        page.wait_for_timeout(_QUIET)
    for event, listener in listeners.items():
        page.remove_listener(event, listener)


def paint(page: "Page", start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke with the brush between two places of the editor's canvas, from 0 to 1."""
    canvas = page.locator("#image canvas").first.bounding_box()
    points = [(canvas["x"] + x * canvas["width"], canvas["y"] + y * canvas["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=5)
    page.mouse.up()


def ask(page: "Page", task: str, question: str | None = None) -> None:
    """Choose a task, type a question unless the task's own text is one, and send it."""
    from playwright.sync_api import expect

    page.get_by_label(task, exact=True).check()
    # The task's text may be there already; its placeholder shows that it has been chosen.
    expect(page.locator("#question textarea")).to_have_attribute("placeholder", HINTS[task])
    expect(page.locator("#question textarea")).to_have_value(TASKS[task])
    if question is not None:
        page.fill("#question textarea", question)
    page.click("#send")


def drawn(page: "Page", number: int = -1) -> Image.Image:
    """Return an image of the chat, by default the last one."""
    images = page.locator("#chat .image-container img")
    address = images.nth(number if number >= 0 else images.count() + number).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")
