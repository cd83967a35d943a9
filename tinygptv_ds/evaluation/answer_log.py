"""Answers on disk while an evaluation runs, so that one that was killed goes on. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.benchmarks.question import Answer
from tinygptv_ds.files import write_atomically

SETTINGS = "settings.json"


class AnswerLog:
    """The answers of one task in a folder: every rank appends lines to a file of its own, and reads all files.

    A line holds a question's number, the hash of its prompt, and the answer. It is taken for that question alone, by
    any rank; a last line that was cut by a kill is dropped.
    """

    def __init__(self, folder: Path, rank: int, asked: Sequence[str]) -> None:
        """`asked`: for each question all that its answer depends on, next to the settings."""
        self._hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in asked]
        self._answers: dict[int, Answer] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"answers-{rank:05d}.jsonl"
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{folder}: another evaluation is writing there; choose another --out") from None
        _cut_torn_line(self._file.fileno(), self._path)
        for file in sorted(folder.glob("answers-*.jsonl")):
            self._answers |= dict(self._taken(file))

    def _taken(self, file: Path) -> Iterator[tuple[int, Answer]]:
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                entry = json.loads(line)
                number = entry["number"]
                if number < len(self._hashes) and entry["prompt"] == self._hashes[number]:
                    yield number, entry["answer"]

    def known(self, numbers: Sequence[int]) -> list[Answer] | None:
        """The answers to these questions, if all are there."""
        have = all(number in self._answers for number in numbers)
        return [self._answers[number] for number in numbers] if have else None

    def add(self, numbers: Sequence[int], answers: Sequence[Answer]) -> None:
        """Append answers; they are in the system's hands when this returns."""
        lines = [
            json.dumps({"number": number, "prompt": self._hashes[number], "answer": answer}, ensure_ascii=False)
            for number, answer in zip(numbers, answers, strict=True)
        ]
        self._file.write(("\n".join(lines) + "\n").encode())
        self._file.flush()
        self._answers |= dict(zip(numbers, answers, strict=True))

    def close(self) -> None:
        """Close the file and let others write."""
        self._file.close()


def refuse_others(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where `folder` holds answers of another model or other settings; says which."""
    file = folder / SETTINGS
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
    names = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
    if names:
        both = [f"{name}: {json.dumps(there.get(name))} there, {json.dumps(settings.get(name))} here" for name in names]
        raise ConfigError(
            f"{folder} holds answers that were made otherwise ({'; '.join(both)}): --fresh starts again and removes "
            "them, or choose another --out"
        )


def begin(folder: Path, settings: Mapping[str, Any], *, fresh: bool) -> None:
    """Note what the answers of `folder` are made with; `fresh` removes those that are there. For one rank alone."""
    for file in folder.glob("answers-*.jsonl") if fresh else ():
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SETTINGS, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def opened(folder: Path, rank: int, asked: Sequence[str]) -> Iterator[AnswerLog]:
    """An `AnswerLog` for a block."""
    log = AnswerLog(folder, rank, asked)
    try:
        yield log
    finally:
        log.close()


def _cut_torn_line(handle: int, path: Path) -> None:
    """So that the next line begins where a line may begin."""
    content = path.read_bytes()
    os.ftruncate(handle, content.rfind(b"\n") + 1)
