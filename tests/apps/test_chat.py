"""The terminal chat: history, images, commands, errors; piped and at a terminal."""

import io
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny
from helpers.patience import PATIENCE
from helpers.verbs import call

from tinygptv_ds.apps import chat
from tinygptv_ds.errors import ConfigError, DataError, WeightsError
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.conversation import Conversation
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.load import LoadedModel
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.templates import choose_template

Say = Callable[..., tuple[str, str]]
SHORT = ("--dtype", "fp32", "--max-new-tokens", "6")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "an image.png"
    path.write_bytes(tiny.encoded_images(1)[0])
    return path


@pytest.fixture
def say(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Pipe lines into the verb; return what it prints and its errors."""

    def run(text: str, *options: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        call(chat, exported, *SHORT, *options)
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def expected(loaded: LoadedModel, *turns: str, image: Path) -> list[str]:
    """Return the answers of a conversation that writes them back."""
    model, processor = loaded
    talk = Conversation(choose_template(None, processor.prompt_template, processor.end_sym))
    given = []
    for number, question in enumerate(turns):
        prompt = talk.ask(question, [image] if number == 0 else [])
        (answer,) = answers(model, processor, [prompt], Generation(max_new_tokens=6))
        talk.add_answer(answer)
        given.append(answer)
    return given


def test_a_conversation(say: Say, loaded: LoadedModel, image: Path) -> None:
    """Answers are streamed in full and written back; a new conversation forgets them."""
    first, second = expected(loaded, "what is it ?", "the bus", image=image)
    out, err = say("what is it ?\n\nthe bus\n", "--image", image)
    assert out == f"{first}\n{second}\n"
    assert "fp32 on cpu, template training" in err.replace("float32", "fp32") and "error" not in err
    out, _ = say(f"/image {image}\nwhat is it ?\n/reset\n/image {image}\nwhat is it ?\n/quit\nnever said\n")
    assert out.count(first) == 2 and "for the next question" in out and "(a new conversation)" in out
    assert out.rstrip().endswith(first)


def test_the_prompt_is_shown(say: Say, image: Path) -> None:
    out, err = say("/prompt\nwhat ?\n/prompt\n", "--image", image, "--show-prompt")
    shown = "[INST] <Img><ImageHere></Img> what ?  [/INST]"
    assert out.count(shown) == 2
    assert "3 of them for 1 image(s), BOS token in front; stops at '###'" in out
    assert "nothing has been asked yet" in err
    out, _ = say("what ?\n", "--template", "B", "--show-prompt")
    assert "<s>[INST] what ? [/INST]" in out and "BOS token" not in out
    assert "BOS token in front" in say("what ?\n", "--template", "C", "--add-bos-token", "--show-prompt")[0]


def test_mistakes_do_not_end_it(say: Say, tmp_path: Path, image: Path) -> None:
    (tmp_path / "torn.png").write_bytes(image.read_bytes()[:60])
    lines = (
        f"/image {tmp_path}/none.png", f"/image {tmp_path}/torn.png", "/image", "/image http://127.0.0.1/x.png",
        "/imagine", "half a \udcff character", "the bus " * 2500, "/help", "the bus",
    )  # fmt: skip
    out, err = say("\n".join(lines))
    for message in (
        "none.png: no such image", "torn.png: the image cannot be decoded", "needs a path or a URL",
        "not on the public internet", "no command /imagine; /help lists them", "holds half a character",
        "exceed the model",
    ):  # fmt: skip
        assert message in err, message
    assert err.count("error: ") == 7
    alone, _ = say("the bus")
    assert out.endswith(alone) and "/image PATH|URL" in out


def test_typed_tokens_are_words(say: Say, image: Path) -> None:
    """Unless asked for: then they are tokens, and images have their place where they are written."""
    typed = "is <ImageHere> a<|endoftext|> ?"
    out, err = say(f"{typed}\n/prompt\n", "--image", image)
    words = re.search(r"prompt: (\d+) tokens, 3 of them for 1 image", out)
    assert "error" not in err and f"[INST] <Img><ImageHere></Img> {typed}  [/INST]" in out
    out, err = say(f"{typed}\n/prompt\n", "--image", image, "--raw")
    raw = re.search(r"prompt: (\d+) tokens, 3 of them for 1 image", out)
    assert "error" not in err and f"[INST] {typed} [/INST]" in out
    assert int(words[1]) > int(raw[1]) + 20  # each letter of `<|endoftext|>` and `<ImageHere>`
    assert "1 times <ImageHere>" in say(f"{typed}\n", "--raw")[1]


def test_mistakes_before_it_begins(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none: no such file or folder"):
        call(chat, tmp_path / "none")
    with pytest.raises(WeightsError, match="no weights there"):
        call(chat, tmp_path)
    with pytest.raises(ConfigError, match=r"--template must be one of .* not 'Z'"):
        call(chat, exported, "--template", "Z")
    with pytest.raises(ConfigError, match="temperature"):
        call(chat, exported, "--temperature", "-1")
    with pytest.raises(DataError, match="no such image"):
        call(chat, exported, "--image", tmp_path / "no.png")


def test_an_answer_is_interrupted(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C keeps what has been said, and the conversation goes on."""

    class Interrupted:
        def __iter__(self) -> object:
            yield "a red"
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    template = choose_template("C", None, "###")
    talk = Conversation(template)
    room = chat.Chat(Answerer(*loaded, template, "tiny"), talk, Generation(max_new_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "stream", lambda *_, **__: Interrupted())
        assert room.take("what ?")
    assert talk.turns == [("what ?", "a red")]
    assert room.take("and ?") and len(talk.turns) == 2
    assert capsys.readouterr().out.startswith("a red\n")


def test_at_a_terminal(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, the answer, Ctrl-D; the history of questions stays for the next time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process, terminal = pty.fork()
    if process == 0:  # the child, with the libraries loaded already
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
        try:
            call(chat, exported, *SHORT)
        finally:
            sys.stdout.flush()
            os._exit(0)
    seen = _read_until(terminal, b"> ")
    os.write(terminal, b"the bus\n")
    seen = _read_until(terminal, b"> ")
    os.write(terminal, b"\x04")
    seen += _read_until(terminal, None)
    assert os.waitpid(process, 0)[1] == 0, seen
    assert seen.startswith(b"the bus\r\n") and seen.count(b"\n") >= 2
    assert "the bus" in (tmp_path / "tinygptv_ds/chat_history").read_text()


def _read_until(terminal: int, end: bytes | None, timeout: float = PATIENCE) -> bytes:
    """Return what appears on the terminal up to `end`, or until it is closed if that is None."""
    seen, until = b"", time.monotonic() + timeout
    while end is None or not seen.endswith(end):
        assert select.select([terminal], [], [], max(0, until - time.monotonic()))[0], seen
        try:
            block = os.read(terminal, 1024)
        except OSError:  # closed
            block = b""
        if not block:
            assert end is None, seen
            return seen
        seen += block
    return seen
