"""A file of questions as JSON lines, each checked before a model is loaded. No torch.

{"question": "[vqa] what is it?", "image": "cat.jpg"}
{"question": "which is larger?", "images": ["a.png", "https://example.org/b.png"], "id": 7}
{"question": "and its colour?", "image": {"shard": "data/x/00000.tar", "key": "000123"},
 "history": [["what is it?", "a bus"]]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygptv_ds.apps.fetch_image import checked_url, fetch_image, is_url
from tinygptv_ds.data.shards.index import load_index
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.errors import DataError

_MAX_FILE_BYTES = 1_000_000_000  # a larger file is not an image


@dataclass(frozen=True)
class ShardSample:
    """All images of one sample of a shard: the tar, the sample's key, and its index in the tar."""

    tar: Path
    key: str
    index: int


@dataclass(frozen=True)
class QuestionRecord:
    """One line of the file.

    Attributes:
        index: its position from 0, not counting blank lines.
        where: file and line, for messages.
        fields: all of its fields.
        question: the question to answer.
        history: earlier questions and answers; the images belong to the first.
        images: files, URLs and samples of shards, in order.
        problem: why it cannot be answered; "" if no reason is known.
    """

    index: int
    where: str
    fields: dict[str, Any]
    question: str = ""
    history: tuple[tuple[str, str], ...] = ()
    images: tuple[Path | str | ShardSample, ...] = ()
    problem: str = ""

    @property
    def length(self) -> tuple[int, int]:
        """Images and characters of the prompt, to sort questions by."""
        return len(self.images), len(self.question) + sum(len(q) + len(a) for q, a in self.history)


class QuestionFile:
    """A reader of questions, which also finds the images that they name.

    Args:
        path: JSON lines.
        root: the folder of images and shards; files outside it are refused.
        reserved: fields of the answers, which a question must not have.
    """

    def __init__(self, path: Path, root: Path, reserved: tuple[str, ...]) -> None:
        self._path, self._root, self._reserved = path, _absolute(root), reserved
        self._keys: dict[Path, dict[str, int]] = {}

    def questions(self) -> list[QuestionRecord]:
        """Read all questions, including those that cannot be answered.

        Raises:
            DataError: the file cannot be read or is empty.
        """
        found = list(self._records())
        if not found:
            raise DataError(f"{self._path}: holds no question; write one JSON object a line")
        return found

    def _records(self) -> Iterator[QuestionRecord]:
        index = 0
        try:
            with self._path.open(encoding="utf-8-sig") as file:
                for number, text in enumerate(file, 1):
                    if text.strip():
                        yield self._record(index, f"{self._path}:{number}", text)
                        index += 1
        except OSError as error:
            raise DataError(f"{self._path}: {error.strerror}; name a file of JSON lines with --input") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8 ({error}); save it as UTF-8") from None

    def _record(self, index: int, where: str, text: str) -> QuestionRecord:
        fields: dict[str, Any] = {}
        try:
            parsed = json.loads(text)
            if not isinstance(parsed, dict):
                raise DataError(f"a JSON object is expected, not a {type(parsed).__name__}")
            fields = parsed
            taken = next((name for name in self._reserved if name in fields), None)
            if taken is not None:
                raise DataError(f"has a field {taken!r}, which answers get; rename it, or see --answer-field")
            history = _history(fields)
            return QuestionRecord(index, where, fields, _question(fields), history, tuple(self._images(fields)))
        except (DataError, ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, DataError) else f"not JSON: {error}"
            return QuestionRecord(index, where, fields, problem=why)

    def _images(self, fields: dict[str, Any]) -> Iterator[Path | str | ShardSample]:
        if "image" in fields and "images" in fields:
            raise DataError("has both 'image' and 'images'; one of them is enough")
        given = fields.get("images", [fields["image"]] if fields.get("image") is not None else [])
        if not isinstance(given, list):
            raise DataError(f"'images' must be a list, not {type(given).__name__}; 'image' takes a single one")
        for source in given:
            if isinstance(source, dict):
                yield self._shard_sample(source)
            elif not isinstance(source, str) or not source:
                raise DataError(f"an image must be a path, a URL, or {{'shard': ..., 'key': ...}}, not {source!r}")
            elif is_url(source):
                checked_url(source)
                yield source
            else:
                yield self._inside(source, "image")

    def _inside(self, name: str, what: str) -> Path:
        """Return the path of a file in the root folder. Links in it may lead elsewhere; `..` may not."""
        path = _absolute(self._root / name)
        if not path.is_relative_to(self._root):
            raise DataError(f"{name} is outside {self._root}, the folder of the {what}s; see --image-root")
        if not path.is_file():
            raise DataError(f"no {what} {path}; correct the path, or see --image-root")
        return path

    def _shard_sample(self, source: dict[str, Any]) -> ShardSample:
        tar, key = source.get("shard"), source.get("key")
        if not isinstance(tar, str) or not isinstance(key, str) or len(source) > 2:
            raise DataError(f"an image in a shard is {{'shard': 'PATH.tar', 'key': 'KEY'}}, not {source!r}")
        path = self._inside(tar, "shard")
        if path not in self._keys:
            index = load_index(path)
            self._keys[path] = {index.key(i): i for i in range(len(index)) if index.lengths[i, 0]}
        if key not in self._keys[path]:
            raise DataError(f"{path} holds no sample {key!r} with an image")
        return ShardSample(path, key, self._keys[path][key])


def _absolute(path: Path) -> Path:
    """Remove `..` from a path as text: `resolve` would follow links."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def read_images(question: QuestionRecord, *, allow_private: bool = False) -> list[bytes]:
    """Read or fetch the encoded images of a question; errors name the image.

    Raises:
        DataError: one cannot be read or fetched.
    """
    found: list[bytes] = []
    for source in question.images:
        if isinstance(source, ShardSample):
            found += ShardReader(max_open=1).read(source.tar, source.index).images  # a reader is not thread-safe
        elif isinstance(source, str):
            found.append(fetch_image(source, allow_private=allow_private))
        else:
            found.append(_read_file(source))
    return found


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{path}: larger than {_MAX_FILE_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _question(fields: dict[str, Any]) -> str:
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"'question' must be a text, not {question!r}")
    return _checked_text(question)


def _history(fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    history = fields.get("history", [])
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list of [question, answer], not {history!r}")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError(f"'history' must be a list of [question, answer]; it holds {turn!r}")
    return tuple((_checked_text(question), _checked_text(answer)) for question, answer in history)


def _checked_text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError("holds half a character (a lone surrogate), which no tokenizer takes")
    return text
