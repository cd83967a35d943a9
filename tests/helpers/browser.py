"""Chromium without a window, on the demo's page: for its tests, and for its image in the README."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from PIL import Image

from tinygptv_ds.apps.demo.page import HINTS, TASKS

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # there is no other machine
)
_PATIENCE = 20_000  # milliseconds
_SETTLING = 300  # of what is seen nowhere on the page


@contextmanager
def visited(url: str, *, width: int = 1280, height: int = 900, scale: float = 1) -> Iterator[tuple["Page", list[str]]]:
    """The demo's page, ready for an image, and the addresses of all that it asks for."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_PATIENCE)
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_OPTIONS))
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.set_default_timeout(_PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#image input[type=file]", state="attached")
        page.wait_for_selector("#image canvas")
        try:
            yield page, asked
        finally:
            browser.close()


def upload(page: "Page", image: bytes) -> None:
    """Put a PNG into the editor, and wait until it is there."""
    file = {"name": "image.png", "mimeType": "image/png", "buffer": image}
    with another_image(page):
        page.set_input_files("#image input[type=file]", files=[file])


@contextmanager
def another_image(page: "Page") -> Iterator[None]:
    """Wait until the editor shows an image of another size: its zoom, of which it makes a text, has changed."""
    zoom = "() => document.querySelector('#image').innerText.match(/\\d+%/)[0]"
    before = page.evaluate(zoom)
    yield
    page.wait_for_function(f"before => ({zoom})() != before", arg=before)
    page.wait_for_timeout(_SETTLING)


def paint(page: "Page", start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke with the brush between two places of the editor's canvas, from 0 to 1."""
    canvas = page.locator("#image canvas").first.bounding_box()
    points = [(canvas["x"] + x * canvas["width"], canvas["y"] + y * canvas["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=5)
    page.mouse.up()


def ask(page: "Page", task: str, words: str | None = None) -> None:
    """Choose a task, type a question unless the task's words are one, and send it."""
    from playwright.sync_api import expect

    page.get_by_label(task, exact=True).check()
    # The task's words may be what stands there already; its hint tells that it has been chosen.
    expect(page.locator("#words textarea")).to_have_attribute("placeholder", HINTS[task])
    expect(page.locator("#words textarea")).to_have_value(TASKS[task])
    if words is not None:
        page.fill("#words textarea", words)
    page.click("#send")


def drawn(page: "Page", number: int = -1) -> Image.Image:
    """An image of the chat, the last one unless told otherwise."""
    images = page.locator("#chat .image-container img")
    address = images.nth(number if number >= 0 else images.count() + number).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")
