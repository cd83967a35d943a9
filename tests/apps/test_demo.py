"""The demo's page in a real browser, with a stand-in for the model whose answers have boxes, and with a tiny model."""

import argparse
import io
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import browser, tiny
from PIL import Image

from tinygptv_ds.apps.demo import demo
from tinygptv_ds.apps.demo import page as page_module
from tinygptv_ds.apps.demo.drawing import COLORS, draw_regions
from tinygptv_ds.apps.demo.example_images import examples
from tinygptv_ds.apps.demo.grounding import find_regions
from tinygptv_ds.apps.demo.page import AnswerFunction, build_page, image_and_mask, launch
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.settings import Generation

needs_browser = pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))
ANSWER = "I see <p>a bus</p> {<20><30><60><70>} & a <b>, <p>men</p> {<0><0><10><10>}<delim>{<90><0><99><10>}."


@contextmanager
def page_with(answer_question: AnswerFunction) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_page(answer_question, "tiny", Generation(max_new_tokens=12))
    try:
        (address,) = launch(page, "127.0.0.1", port)
        yield address
    finally:
        page.close(verbose=False)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@needs_browser
def test_an_image_is_asked_about_and_the_answers_boxes_are_drawn() -> None:
    """Also painted on, and asked about again with the history, which another image ends; all without a network."""
    from playwright.sync_api import expect

    asked, ended = [], []

    def reply(turns: list, question: str, image: Image.Image | None, settings: Generation) -> Iterator[str]:
        asked.append((list(turns), question, image, settings))
        try:
            while question == "go on":
                time.sleep(0.02)
                yield "and "
        finally:
            ended.append(question)
        yield from (ANSWER[at : at + 7] for at in range(0, len(ANSWER), 7))

    photo = Image.new("RGB", (400, 200), (10, 160, 250))
    with page_with(reply) as url, browser.visited(url) as (page, requests):
        browser.upload(page, png(photo))
        browser.ask(page, "Grounding")
        answer = page.locator("#chat .bot.message").last
        expect(page.locator("#chat .image-container img")).to_have_count(1)
        expect(page.locator("#chat .bot.message")).to_contain_text("I see a bus & a <b>, men.")
        colours = [phrase.get_attribute("style") for phrase in page.locator("#chat b").all()]
        assert colours == [f"color: rgb{COLORS[0]}", f"color: rgb{COLORS[1]}"]
        there = draw_regions(photo, find_regions(ANSWER))
        assert browser.drawn(page).tobytes() == there.tobytes() and there.getpixel((100, 100)) == COLORS[0]
        turns, question, image, settings = asked[0]
        assert (turns, question) == ([], "[grounding] describe this image in detail")
        assert image.tobytes() == photo.tobytes()
        assert settings == Generation(max_new_tokens=12)

        browser.paint(page, (0.4, 0.5), (0.6, 0.6))
        browser.ask(page, "Identify")
        expect(page.locator("#chat .image-container img")).to_have_count(3)  # the question's own box, and the answer's
        turns, question, _, _ = asked[1]
        assert turns == [("[grounding] describe this image in detail", ANSWER)]
        box = [int(side) for side in question.removeprefix("[identify] what is this {<").removesuffix(">}").split("><")]
        assert 30 < box[0] < box[2] < 70 and 40 < box[1] < box[3] < 80
        assert browser.drawn(page, 1).tobytes() == draw_regions(photo, find_regions(question)).tobytes()

        with browser.another_image(page):
            page.get_by_text("[vqa] how many digits are there?").click()
        expect(page.locator("#question textarea")).to_have_value("[vqa] how many digits are there?")
        page.click("#send")
        expect(page.locator("#chat .user.message")).to_have_count(1)
        expect(page.locator("#chat .image-container img")).to_have_count(1)
        turns, question, image, _ = asked[2]
        assert turns == [] and question == "[vqa] how many digits are there?"
        assert image.tobytes() == examples()[-1][0].tobytes()

        browser.upload(page, png(photo))
        expect(answer).to_have_count(0)
        browser.ask(page, "Chat", "go on")
        expect(answer).to_contain_text("and and")
        page.click("#reset")
        expect(answer).to_have_count(0)
        while ended[-1] != "go on":  # as long as the test may take
            page.wait_for_timeout(20)
        expect(answer).to_have_count(0)
        assert [url for url in requests if not url.startswith(("http://127.0.0.1", "blob:", "data:"))] == []


@needs_browser
def test_the_page_with_a_model(exported: Path, loaded: object) -> None:
    """A plain question is answered as by `answers`; the page shows why a question cannot be asked."""
    from playwright.sync_api import expect

    args = argparse.ArgumentParser()
    demo.add_arguments(args)
    answer_question, name, samples = demo.load_answer_function(args.parse_args([str(exported), "--dtype", "fp32"]))
    assert name == "exported" and len(samples) == 3  # for a model of small images
    (image,) = tiny.encoded_images(1)
    with page_with(answer_question) as url, browser.visited(url) as (page, _):
        browser.upload(page, image)
        browser.ask(page, "Chat", "what colour ?")
        model, processor = loaded
        asked = Prompt(("[INST] <Img><ImageHere></Img> what colour ?  [/INST]",), (image,), add_bos_token=True)
        (expected,) = answers(model, processor, [asked], Generation(max_new_tokens=12))
        expect(page.locator("#chat .bot.message")).to_have_text(expected)
        browser.ask(page, "Chat", "")
        expect(page.get_by_text("There is no question.")).to_be_visible()
        browser.ask(page, "Chat", "word " * 3000)
        expect(page.get_by_text("exceed the model's")).to_be_visible()


def test_a_growing_answer_is_redrawn_at_most_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every token, a browser would let no click on Stop or Reset through. The whole answer is always shown."""
    now = [0.0]
    monkeypatch.setattr(page_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def answer_question(*_: object) -> Iterator[str]:
        for number in range(100):
            now[0] += 0.0625
            yield f"{number} "

    ask = page_module._ask_function(answer_question, Generation())
    sliders = [1.0] * len(page_module._SLIDERS)
    states = list(ask("count", None, [], page_module.ImageConversation(), *sliders))
    texts = [chat[-1]["content"] for _, chat, _ in states]
    assert texts[:2] == ["", "0 1 "]
    assert len(texts) == 1 + 50 + 1  # the question, every second token, and the whole answer
    assert texts[-1] == "".join(f"{number} " for number in range(100))
    assert states[-1][2].turns == [("count", texts[-1])]


def test_the_mask_of_what_is_painted() -> None:
    assert image_and_mask(None) == image_and_mask({"background": None, "layers": [], "composite": None}) == (None, None)
    image, layer = Image.new("RGBA", (4, 2), (1, 2, 3, 0)), Image.new("RGBA", (4, 2))
    seen, mask = image_and_mask({"background": image, "layers": [layer]})
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (1, 2, 3) and mask is None
    layer.putpixel((3, 1), (0, 0, 0, 9))
    _, mask = image_and_mask({"background": image, "layers": [layer, Image.new("RGBA", (4, 2))]})
    assert mask.getbbox() == (3, 1, 4, 2)


def test_examples_are_small_and_the_same_each_time() -> None:
    made = examples()
    assert [(a.tobytes(), q) for a, q in made] == [(a.tobytes(), q) for a, q in examples()]
    assert max(max(image.size) for image, _ in made) <= 500


def test_examples_suit_the_model() -> None:
    """Words in brackets are for the stage that learns them, and photos for models that see more than digits."""
    for template, tasks in (("[INST] {} [/INST]", True), ("###Human: {} ###Assistant: ", False), ("{}", False)):
        for size, photos in ((448, True), (84, False)):
            made = examples(template, size)
            assert any(question.startswith("[") for _, question in made) == tasks
            assert any(image.size == (480, 320) for image, _ in made) == photos
    assert {q for _, q in examples()} == {q for _, q in examples("[INST] {} [/INST]", 224)}


def test_an_empty_answer_is_shown_as_such() -> None:
    for answer, shown in (("", "(an empty answer)"), (" \n", "(an empty answer)"), ("a bus", "a bus")):
        (message,) = page_module._answer_messages(answer, Image.new("RGB", (4, 4)))
        assert message["content"] == shown


def test_a_visitor_who_leaves_prints_no_traceback() -> None:
    """During an upload, or with a session that the server does not know; other errors are logged as before."""

    def never(*args: object) -> Iterator[str]:
        yield ""

    records: list[logging.LogRecord] = []
    server, kept = logging.getLogger("uvicorn.error"), logging.Handler()
    kept.emit = records.append
    upload = "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9999\r\n\r\n--x\r\n"
    requests = [f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\n{upload}"]
    requests += [
        f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in ("gradio_api/queue/data?session_hash=gone", "config")
    ]
    with page_with(never) as url:
        server.addHandler(kept)
        for request in requests:
            with socket.create_connection(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))) as client:
                client.sendall(request.encode())
                answer = b"" if "POST" in request else client.recv(20)
        time.sleep(0.5)  # the server notices
        server.error("of its own", exc_info=OSError())
        server.removeHandler(kept)
    assert answer.startswith(b"HTTP/1.1 200")
    assert [record.getMessage() for record in records] == ["of its own"]
