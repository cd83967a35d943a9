"""From a stored record to the texts of one training sample: caption clean-up, instruction pools, random choices.

A record has one of three shapes, recognised by the key it holds:

- ``caption``: one caption, no instruction (LAION, CC3M/SBU as img2dataset writes them);
- ``conversation``: ``[[question, answer], ...]``;
- ``answer``: a single turn, with ``text`` and ``pool`` for its instruction.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from tinygptv_ds.errors import DataError

IMAGE_PLACEHOLDER = "<ImageHere>"
IMAGE_TAG = f"<Img>{IMAGE_PLACEHOLDER}</Img>"

# Half a character, which no text may hold: inside a typed `<ImageHere>` or special token it takes that its meaning.
_BREAK = "\udbff"

# Draws a uniform integer in [0, n). data/stream/mixture.py has the one that makes a stream reproducible.
Draw = Callable[[int], int]


@dataclass(frozen=True)
class Prompts:
    """The instruction pools of prompts.yaml by name: vqa, refer, identify, grounding, detection, caption, stage3."""

    pools: dict[str, tuple[str, ...]]

    def __getitem__(self, name: str) -> tuple[str, ...]:
        if name not in self.pools:
            raise DataError(f"no instruction pool is called {name!r}; there are {', '.join(self.pools)}")
        return self.pools[name]


@dataclass(frozen=True)
class Rendered:
    """One sample as (question, answer) turns.

    The first question is the whole instruction, image tags included; it is None for a bare caption.
    """

    turns: tuple[tuple[str | None, str], ...]


@lru_cache(maxsize=1)
def load_prompts() -> Prompts:
    """Read prompts.yaml, once per process."""
    text = files("tinygptv_ds.processing").joinpath("prompts.yaml").read_text(encoding="utf-8")
    return Prompts({name: tuple(entries) for name, entries in yaml.safe_load(text).items()})


def wrap(template: str | None, question: str) -> str:
    """Return the question inside the template; braces of the question stay as they are."""
    return question if template is None else template.replace("{}", question, 1)


def as_plain_text(text: str, meaningful: Collection[str]) -> str:
    """Return a text in which none of `meaningful` means anything any more, but is read letter by letter.

    `split_plain_text` has the text as it was.

    Raises:
        DataError: the text holds half a character, which no tokenizer takes.
    """
    _check_whole_characters(text, "the text")
    for token in sorted(meaningful, key=len, reverse=True):  # the longest first, since one may be part of another
        text = text.replace(token, token[:1] + _BREAK + token[1:])
    return text


def split_plain_text(text: str) -> list[str]:
    """Return a text of `as_plain_text` in parts, in none of which anything is meaningful; other texts are one part."""
    return text.split(_BREAK)


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-case, drop ``. ! " ( ) * # : ; ~``, squeeze runs of white space, keep the first `max_words` words.

    To the letter what BLIP's caption processor does (LAVIS ``blip_processors.py``), oddities included: words are
    split at single spaces only, so a lone tab or newline is no word break, and a leading newline stays.
    """
    text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def render(
    record: dict[str, Any], num_images: int, draw: Draw, *, clean: bool = True, place_images: bool = True
) -> Rendered:
    """Make the random choices of a record and return its turns.

    `num_images` is the number of images stored with the sample. `draw` is called in a fixed order (text, pool entry,
    answer) even where there is one choice only, so a record's outcome depends on nothing but the numbers drawn.
    `clean=False` leaves every text as it is stored; `place_images=False` leaves out the image tags, and the spaces that
    come with them, of records that do not place their images themselves (`raw`).

    Raises DataError naming the field that is wrong.
    """
    if "caption" in record:
        caption = _string(record["caption"], "caption")
        turns: Sequence[tuple[str | None, str]] = [
            (None, clean_caption(caption) if clean and "answer" in _clean_fields(record, ["answer"]) else caption)
        ]
    elif "conversation" in record:
        turns = _conversation(record, num_images if place_images else 0, clean)
    elif "answer" in record:
        turns = [_single_turn(record, num_images if place_images else 0, draw, clean)]
    else:
        raise DataError("the record has none of the fields 'caption', 'answer', 'conversation'")
    if place_images or record.get("raw"):
        _check_placeholders(turns, num_images)
    return Rendered(tuple(turns))


def _single_turn(record: dict[str, Any], num_images: int, draw: Draw, clean: bool) -> tuple[str, str]:
    cleaned = _clean_fields(record, []) if clean else []
    text = _choose(record.get("text", ""), "text", draw)
    if "text" in cleaned:
        text = clean_caption(text)
    pool = ("{}",) if record.get("pool") is None else load_prompts()[_string(record["pool"], "pool")]
    instruction = pool[draw(len(pool))].replace("{}", text, 1)
    answer = _choose(record["answer"], "answer", draw)
    if "answer" in cleaned:
        answer = clean_caption(answer)
    return _with_images(instruction, record, num_images), answer


def _conversation(record: dict[str, Any], num_images: int, clean: bool) -> list[tuple[str, str]]:
    cleaned = _clean_fields(record, []) if clean else []
    turns = []
    for number, turn in enumerate(_list(record["conversation"], "conversation")):
        where = f"conversation[{number}]"
        question, answer = _list(turn, where, length=2)
        if answer is None and number + 1 == len(record["conversation"]):
            break  # a last question without an answer teaches nothing; the original repeats the answer before it
        question, answer = _string(question, f"{where}[0]"), _string(answer, f"{where}[1]")
        if "text" in cleaned:
            question = clean_caption(question)
        if "answer" in cleaned:
            answer = clean_caption(answer)
        if number == 0:
            question = _with_images(question, record, num_images)
        elif num_images and not record.get("raw"):
            question += " "
        turns.append((question, answer))
    if not turns:
        raise DataError("field 'conversation' holds no answered question")
    return turns


def _with_images(instruction: str, record: dict[str, Any], num_images: int) -> str:
    """Put the image tags first and a space last. ``raw`` records and text alone are left as they are."""
    if record.get("raw") or num_images == 0:
        return instruction
    return f"{IMAGE_TAG * num_images} {instruction} "


def _check_placeholders(turns: Sequence[tuple[str | None, str]], num_images: int) -> None:
    found = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns if question is not None)
    if turns[0][0] is not None and found != num_images:
        raise DataError(
            f"the questions hold {found} times {IMAGE_PLACEHOLDER!r}, but the sample has {num_images} image(s); "
            f"leave it out of the text, or set 'raw': true and place one per image"
        )


def _clean_fields(record: dict[str, Any], default: list[str]) -> list[str]:
    fields = _list(record.get("clean", default), "clean", allow_empty=True)
    unknown = [field for field in fields if field not in ("text", "answer")]
    if unknown:
        raise DataError(f"field 'clean' may list 'text' and 'answer', not {unknown[0]!r}")
    return fields


def _choose(value: object, field: str, draw: Draw) -> str:
    choices = [value] if isinstance(value, str) else _list(value, field)
    number = draw(len(choices))
    return _string(choices[number], f"{field}[{number}]" if isinstance(value, list) else field)


def _string(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a string, not {type(value).__name__}")
    _check_whole_characters(value, f"field {field!r}")
    return value


def _check_whole_characters(text: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where} holds half a character (a lone surrogate), which no tokenizer takes")


def _list(value: object, field: str, *, length: int | None = None, allow_empty: bool = False) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"field {field!r} must be a list, not {type(value).__name__}")
    if length is not None and len(value) != length:
        raise DataError(f"field {field!r} must have {length} entries, not {len(value)}")
    if not value and not allow_empty:
        raise DataError(f"field {field!r} is empty")
    return value
