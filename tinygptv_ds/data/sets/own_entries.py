"""An entry of a user's own data, whatever its spelling, as the record and the images of a sample."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import Built, SkipEntry, turn
from tinygptv_ds.data.sets.own_images import IMAGE_KEYS, MEDIA_KEYS, check_other_keys, find_images, resolve_image
from tinygptv_ds.data.sets.own_texts import MARK, TEXT_KEYS, Texts, given, read_texts
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_TAG

_KEPT = ("id", "question_id", "task")  # fields that are copied into the record
_END = "<|endoftext|>"
_MAIN_KEYS = ("image", "conversations", "question", "answer", "caption", "system", "history")


def parse_columns(options: Sequence[str]) -> dict[str, str]:
    """Read the values of ``--columns``: ``theirs=ours`` reads key `theirs` as `ours`, ``theirs=`` ignores it.

    Raises DataError for anything else.
    """
    columns = {}
    for option in (part for value in options for part in value.split(",")):
        theirs, equals, ours = (word.strip() for word in option.partition("="))
        if not theirs or not equals or (ours and ours not in TEXT_KEYS | set(IMAGE_KEYS) | MEDIA_KEYS | set(_KEPT)):
            raise DataError(
                f"--columns {option!r}: write THEIRS=OURS, where OURS is one of {', '.join(_MAIN_KEYS)}, or nothing to "
                f"ignore THEIRS"
            )
        columns[theirs.lower()] = ours
    return columns


def build_entry(entry: Any, folder: Path, columns: Mapping[str, str]) -> Built:
    """Return the record and the images of an entry; paths start from `folder`.

    Raises SkipEntry or KeyError with what is wrong.
    """
    if isinstance(entry, SkipEntry):
        raise entry
    fields = _fields(entry, columns)
    texts = read_texts(fields)
    values = find_images(fields, texts.images, needed=texts.caption is not None)
    check_other_keys(fields, TEXT_KEYS | MEDIA_KEYS, values, folder)
    _check_end_tokens(texts)
    images = [resolve_image(value, folder) for value in values]
    record = _record(texts, images)
    if texts.caption is not None:
        if not images:
            raise SkipEntry("missing_image", f"a caption that names no image; its keys are {', '.join(fields)}")
        if isinstance(values[0], str) and len(values[0]) < 1000:
            record["id"] = values[0]
    return {**record, **{key: fields[key] for key in _KEPT if given(fields.get(key))}}, images, texts.notes


def record_of(entry: Any, num_images: int) -> dict[str, Any]:
    """Return the record of an entry in a shard, whose images are stored next to it, in their order.

    Raises DataError with what is wrong.
    """
    images: list[Any] = list(range(num_images))
    try:
        texts = read_texts(_fields(entry, {}))
        _check_end_tokens(texts)
        record = _record(texts, images)
    except SkipEntry as skip:
        raise DataError(str(skip)) from skip
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise DataError(f"{type(error).__name__}: {error} in {str(entry)[:200]}") from error
    if images != list(range(num_images)):
        raise DataError("the marks of its images are numbered in another order than the images are stored")
    return record


def caption_record(text: str) -> tuple[dict[str, Any], list[str]]:
    """Return the record of a caption, and notes on what was changed. Raises SkipEntry if it cannot be used."""
    texts = read_texts({"caption": text})
    _check_end_tokens(texts)
    return {"caption": texts.caption, "clean": []}, texts.notes


def _fields(entry: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of an entry with keys in lower case, renamed as ``--columns`` asks."""
    if isinstance(entry, list) and entry and all(isinstance(spoken, dict) for spoken in entry):
        entry = {"conversations": entry}
    if not isinstance(entry, dict):
        raise SkipEntry("bad_record", f"is a {type(entry).__name__}, not an object: {str(entry)[:200]}")
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        theirs = str(key).strip().lower()
        ours = columns.get(theirs, theirs)
        if ours in fields:
            raise SkipEntry("bad_record", f"two keys are read as {ours!r}; ignore one with --columns {key}=")
        if ours:
            fields[ours] = value
    return fields


def _record(texts: Texts, images: list[Path | bytes]) -> dict[str, Any]:
    if texts.caption is not None:
        return {"caption": texts.caption, "clean": []}
    pairs = texts.pairs
    _order_images(texts.order, images)
    raw = _place_images(pairs, len(images))
    if texts.system:
        pairs[0][0] = f"{texts.system}\n{pairs[0][0]}"
    return turn(None, *pairs[0], raw=raw) if texts.single else {"conversation": pairs, "clean": [], "raw": raw}


def _order_images(order: list[int], images: list[Path | bytes]) -> None:
    """Bring the images into the order of numbered marks, which count from 0 or 1."""
    if sorted(order) == list(range(min(order, default=0), len(images) + min(order, default=0))):
        images[:] = [images[number - min(order)] for number in order]


def _place_images(pairs: list[list[Any]], num_images: int) -> bool:
    """Replace the marks in the questions by image tags; return False if the images go in front, which needs no tag."""
    marks = sum(question.count(MARK) for question, _ in pairs)
    if not marks:
        return False
    if marks != num_images:
        advice = "name the image under 'image'" if not num_images else "mark each image once, where it is shown first"
        raise SkipEntry("bad_record", f"the questions hold {MARK} {marks} time(s) for {num_images} image(s); {advice}")
    first = pairs[0][0].strip()
    if num_images == 1 and (first.startswith(MARK) or first.endswith(MARK)):
        pairs[0][0] = first.replace(MARK, "").strip()
        return False
    for pair in pairs:
        pair[0] = pair[0].replace(MARK, IMAGE_TAG)
    return True


def _check_end_tokens(texts: Texts) -> None:
    """Remove the end token after an answer, which training adds itself; elsewhere it would cut the text."""

    def ended(text: Any) -> Any:
        if isinstance(text, list):
            return [ended(one) for one in text]
        if isinstance(text, str) and text.rstrip().endswith(_END):
            texts.notes.append("end_token_removed")
            return text.rstrip().removesuffix(_END).rstrip()
        return text

    texts.caption = ended(texts.caption)
    texts.pairs = [[question, ended(answer)] for question, answer in texts.pairs]
    if _END in str((texts.caption, texts.pairs, texts.system)):
        raise SkipEntry(
            "special_token", f"a text holds {_END!r}, which the tokenizer reads as the end and not as words; remove it"
        )
