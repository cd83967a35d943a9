"""The texts of an entry of a user's own data: conversations, questions and captions in the usual trainers' spellings.

Read are the forms of LLaVA (``conversations``, ``from``, ``value``), OpenAI, ms-swift and LLaMA-Factory (``messages``,
``role``, ``content``, also as a list of parts), Alpaca (``instruction``, ``input``, ``output``, ``history``), ShareGPT,
XTuner, and plain questions with answers, or captions.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tinygptv_ds.data.sets.common import SkipEntry
from tinygptv_ds.data.sets.own_images import IMAGE_KEYS, MEDIA_KEYS, image_values

MARK = "<image>"
CONVERSATION_KEYS = ("conversations", "messages", "conversation", "dialogue", "dialog", "turns", "chat")
INSTRUCTION_KEYS = ("instruction", "prompt")
QUESTION_KEYS = ("question", "query", "problem", "input", "user", "human")
ANSWER_KEYS = ("answer", "response", "output", "completion", "target", "solution", "answers", "assistant", "gpt")
CAPTION_KEYS = ("caption", "captions", "text", "description")
OTHER_TEXT_KEYS = ("system", "history")
TEXT_KEYS = {
    *CONVERSATION_KEYS,
    *INSTRUCTION_KEYS,
    *QUESTION_KEYS,
    *ANSWER_KEYS,
    *CAPTION_KEYS,
    *OTHER_TEXT_KEYS,
}
SPELLINGS = (
    "conversations or messages; question (or query, instruction, prompt) with answer (or response, output); or caption"
)
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt", "ai"), "assistant"),
    "system": "system",
}
_ROLE_KEYS, _TEXT_OF_TURN_KEYS = ("from", "role", "speaker"), ("value", "content", "text")
# Other trainers' marks for the place of an image; a number in it says which image.
_OTHER_MARKS = re.compile(
    r"<\|?image[_-]?(\d*)\|?>|<Img><ImageHere></Img>|<ImageHere>|<image_placeholder>"
    r"|(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?",
    re.IGNORECASE,
)
# Qwen-VL names the file itself, and numbers it.
_INLINE = re.compile(r"(?:Picture \d+: ?)?<img>\s*([^<>\n]+?)\s*</img>", re.IGNORECASE)  # codespell:ignore
# How pandas and spreadsheets write that there is no value.
_MISSING = ("nan", "null", "none", "n/a", "#n/a", "<na>")


@dataclass
class Texts:
    """The texts of an entry, with `MARK` at the places of images.

    Either `caption` is set, or `pairs` holds [question, answer], a last answer being None where there is none. `single`
    says that there is one pair that is no conversation, whose answer may be a list to draw from. `system` is a text to
    are placed before the first question. `images` are the values of images named within the texts; `order` holds the
    numbers of numbered marks. `notes` name what was changed, for counting.
    """

    caption: Any = None
    pairs: list[list[Any]] = field(default_factory=list)
    single: bool = False
    system: str = ""
    images: list[Any] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_texts(fields: Mapping[str, Any]) -> Texts:
    """Read the texts of an entry, whose keys are in lower case.

    Raises SkipEntry where they cannot be used, and KeyError if there are none.
    """
    texts = Texts(system=_optional(fields, "system"))
    talks = [key for key in CONVERSATION_KEYS if given(fields.get(key))]
    if len(talks) > 1:
        raise SkipEntry(
            "bad_record", f"holds both {talks[0]!r} and {talks[1]!r}; ignore one with --columns {talks[1]}="
        )
    instruction, question = _first(fields, INSTRUCTION_KEYS), _first(fields, QUESTION_KEYS)
    answer, caption = _first(fields, ANSWER_KEYS, empty=True), _first(fields, CAPTION_KEYS, empty=True)
    asked = [value for key, value in (instruction, question) if key]
    if talks:
        _read_turns(texts, _parsed(fields[talks[0]], talks[0]))
    elif answer[0] and not asked and caption[0] == "text":
        _read_pair(texts, [caption[1]], answer[1])
    elif answer[0] and asked:
        _read_history(texts, fields.get("history"))
        _read_pair(texts, asked, answer[1])
    elif asked and caption[0]:
        _read_pair(texts, asked, caption[1])
    elif caption[0] and not answer[0]:
        texts.caption = _caption(caption[1])
    else:
        _nothing_to_read(fields, "answer" if asked else "question" if answer[0] else "")
    if texts.caption is None:
        _check_answers([answer for _, answer in texts.pairs])
    return texts


def _nothing_to_read(fields: Mapping[str, Any], field: str) -> NoReturn:
    """Raise SkipEntry for an entry without the texts of a sample; `field` is what it lacks to be a question."""
    empty = next((key for key in (*CONVERSATION_KEYS, *CAPTION_KEYS) if key in fields), None)
    if empty and not field:
        raise SkipEntry("empty_answer", f"its {empty!r} is empty")
    keys = ", ".join(map(str, fields)) or "none"
    raise SkipEntry(
        "missing_field",
        f"has no {field or CONVERSATION_KEYS[0]!r}; its keys are {keys}; read are {SPELLINGS}; "
        f"--columns THEIRS=OURS renames a key",
        field or CONVERSATION_KEYS[0],
    )


def given(value: Any) -> bool:
    """Return whether a field has a value: None, NaN and empty ones are none."""
    return not (value is None or value != value or (isinstance(value, str | list | tuple | dict | bytes) and not value))


def _first(fields: Mapping[str, Any], keys: Sequence[str], *, empty: bool = False) -> tuple[str, Any]:
    """Return the first key that is there and its value; ("", None) if there is none. `empty` texts count, too."""
    for key in keys:
        if given(fields.get(key)) or (empty and fields.get(key) == ""):
            return key, fields[key]
    return "", None


def _optional(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    return value.strip() if isinstance(value, str) else ""


def _parsed(value: Any, key: str) -> Sequence[Any]:
    """Return a list that may be written as JSON in the cell of a table."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SkipEntry("bad_record", f"field {key!r} is no list of turns, and no JSON ({error})") from error
    if not isinstance(value, list):
        raise SkipEntry("bad_record", f"field {key!r} must be a list of turns, not {type(value).__name__}")
    return value


def _caption(value: Any) -> Any:
    if isinstance(value, list):
        if len(value) != 1:
            raise SkipEntry("bad_record", f"{len(value)} captions; give each an entry of its own")
        value = value[0]
    if isinstance(value, str):
        if not value.strip():
            raise SkipEntry("empty_answer", "its caption is empty")
        if value.strip().lower() in _MISSING:
            raise SkipEntry("empty_answer", f"its caption is {value.strip()!r}, which means that there is no value")
        if _OTHER_MARKS.search(value):
            raise SkipEntry("mark_in_answer", f"its caption holds {MARK}, which would be trained as a word; remove it")
    return value


def _read_pair(texts: Texts, asked: list[Any], answer: Any) -> None:
    """Append a question, whose parts are on separate lines, with its answer."""
    for part in asked:
        if not isinstance(part, str):
            raise SkipEntry("bad_record", f"a question must be a string, not {type(part).__name__}")
    if isinstance(answer, list):
        answer = [value.get("answer") if isinstance(value, dict) else value for value in answer]
    texts.single = not texts.pairs
    texts.pairs.append([_marked("\n".join(asked), texts), answer])


def _read_history(texts: Texts, history: Any) -> None:
    """Read the earlier turns of ms-swift's and LLaMA-Factory's form: ``[[question, answer], ...]``."""
    if given(history):
        _read_turns(texts, _parsed(history, "history"))


def _read_turns(texts: Texts, turns: Sequence[Any]) -> None:
    """Read the turns of a conversation: merge what follows itself, and let a question come first."""
    spoken: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        for role, text in _turn(texts, turn, number):
            if role == "system" and not spoken:
                texts.system = "\n".join(filter(None, (texts.system, text.strip())))
                continue
            role = "user" if role == "system" else role
            if spoken and spoken[-1][0] == role:
                spoken[-1] = (role, f"{spoken[-1][1]}\n{text}")
                texts.notes.append("joined_turns")
            else:
                spoken.append((role, text))
    _check_answers([text for role, text in spoken if role == "assistant"], may_be_empty=True)
    if spoken and spoken[0][0] == "assistant":
        del spoken[0]
        texts.notes.append("leading_answer_dropped")
    if not spoken:
        raise SkipEntry("bad_record", "the conversation holds no question")
    values: list[Any] = [text for _, text in spoken] + [None] * (len(spoken) % 2)
    texts.pairs += [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]


def _turn(texts: Texts, turn: Any, number: int) -> list[tuple[str, str]]:
    """Return the (role, text) of one turn, or of both where a turn is a pair."""
    if isinstance(turn, list | tuple) and len(turn) == 2:  # our own records, and histories
        return [("user", _text(texts, turn[0], "user")), ("assistant", _text(texts, turn[1], "assistant"))]
    if not isinstance(turn, dict):
        raise SkipEntry("bad_record", f"turn {number} is a {type(turn).__name__}, not an object")
    turn = {str(key).lower(): value for key, value in turn.items()}
    if "input" in turn and "output" in turn:  # XTuner
        roles = [(role, turn[key]) for role, key in (("system", "system"), ("user", "input")) if given(turn.get(key))]
        return [(role, _text(texts, value, role)) for role, value in (*roles, ("assistant", turn["output"]))]
    for key in MEDIA_KEYS & turn.keys():
        if given(turn[key]):
            raise SkipEntry("unsupported_media", f"turn {number} has {key!r}, which is not read")
    name = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    if name is None:
        raise KeyError("from")
    role = _ROLES.get(str(name).lower())
    if role is None:
        known = ", ".join(sorted(_ROLES))
        raise SkipEntry("bad_record", f"turn {number} is from {name!r}, which is not read; the roles are {known}")
    key = next((key for key in _TEXT_OF_TURN_KEYS if key in turn), None)
    if key is None:
        raise KeyError("value")
    own = [value for spelling in IMAGE_KEYS if spelling in turn for value in image_values(turn[spelling])]
    text = _text(texts, turn[key], role, images=own)
    return [(role, text)]


def _text(texts: Texts, content: Any, role: str, images: Sequence[Any] = ()) -> str:
    """Return the text of a turn, of which the content may be a list of parts; `images` are those of the turn itself."""
    if content is None and role == "assistant":
        content = ""
    parts = content if isinstance(content, list) else [content]
    text, marks = "", 0
    for part in parts:
        if isinstance(part, str):
            text += ("\n" if text and not text.endswith((MARK, "\n")) else "") + part
        elif isinstance(part, dict):
            piece, is_image = _part(texts, part)
            marks += is_image
            text += ("\n" if text and not text.endswith("\n") and not is_image else "") + piece
        else:
            raise SkipEntry("bad_record", f"a text must be a string, not {type(part).__name__}")
    if role == "assistant":
        if marks or images:
            raise SkipEntry("mark_in_answer", "an answer holds an image; images are read in questions only")
        return text
    text = _marked(text, texts)
    if images:
        if not text.count(MARK):
            text = MARK * len(images) + "\n" + text
        texts.images += images
    return text


def _part(texts: Texts, part: dict[str, Any]) -> tuple[str, bool]:
    """Return the text of a part of a content, and whether it is an image."""
    part = {str(key).lower(): value for key, value in part.items()}
    kind = part.get("type", "text" if "text" in part else "image")
    if kind in ("text", "input_text"):
        text = part.get("text", part.get("content"))
        if not isinstance(text, str):
            raise SkipEntry("bad_record", "a part of type 'text' has no string under 'text'")
        return text, False
    if kind in ("image", "image_url", "input_image"):
        keys = [key for key in (*IMAGE_KEYS, "bytes", "content", "source", "data") if given(part.get(key))]
        texts.images += [value for key in keys[:1] for value in image_values(part[key])]
        return MARK, True
    raise SkipEntry("unsupported_media", f"a part of type {kind!r} is not read")


def _marked(text: str, texts: Texts) -> str:
    """Write every mark of an image as `MARK`, and collect images that are named in the text itself."""

    def inline(found: re.Match[str]) -> str:
        texts.images.append(found[1])
        return MARK

    def mark(found: re.Match[str]) -> str:
        if found[1]:
            texts.order.append(int(found[1]))
        return MARK

    if "<" not in text:
        return text
    if "<video>" in text or "<audio>" in text:
        raise SkipEntry("unsupported_media", "a question holds <video> or <audio>, which are not read")
    return _OTHER_MARKS.sub(mark, _INLINE.sub(inline, text))


def _check_answers(answers: Sequence[Any], *, may_be_empty: bool = False) -> None:
    """Raise SkipEntry if an answer holds a mark, or if no answer holds a word."""
    values = [value for answer in answers for value in (answer if isinstance(answer, list) else [answer])]
    words = [value for value in values if isinstance(value, str)]
    if any(_OTHER_MARKS.search(value) for value in words if "<" in value):
        raise SkipEntry("mark_in_answer", f"an answer holds {MARK}, which would be trained as a word; remove it")
    if not may_be_empty and words and not any(map(str.strip, words)):
        raise SkipEntry("empty_answer", "its answer is empty")
    if not may_be_empty and not words and all(value is None for value in values):
        raise SkipEntry("empty_answer", "it has a question without an answer")
