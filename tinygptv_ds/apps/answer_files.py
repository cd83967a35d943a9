"""Answers on the disk while they are made: one file a rank, so that a killed job goes on where it was. No torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.files import whole_file, write_atomically

_JOB = "job.json"


class Answered:
    """The folder `OUTPUT.parts`, in which each rank appends to its file, and which ends as the one file `OUTPUT`.

    A line that a kill has cut short is dropped; one that failed is done again.

    Args:
        output: the file at the end.
        rank: who writes.
    """

    def __init__(self, output: Path, rank: int) -> None:
        self._output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self._own = self.folder / f"rank-{rank:05d}.jsonl"

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folder, or see that it is of the same job: the same questions, model and settings.

        Raises:
            ConfigError: it is not; names what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / _JOB
        if not note.is_file():
            write_atomically(note, json.dumps(job, indent=2).encode())
            return
        there = json.loads(note.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*there, *job} if there.get(key) != job.get(key))
        if differing:
            raise ConfigError(
                f"{self.folder} holds answers of a job that differs in {', '.join(differing)}; repeat that job's "
                "command to go on, remove the folder to begin again, or choose another --output"
            )

    def done(self) -> set[int]:
        """Indexes of the lines that any rank, of this or an earlier run, has answered."""
        return {index for index, record in self._records() if "error" not in record}

    def __enter__(self) -> Self:
        _drop_torn_line(self._own)
        self._file = self._own.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, index: int, record: Mapping[str, Any]) -> None:
        """Append one line's fields with its answer or error."""
        self._file.write(_json({"index": index, "record": record}) + "\n")
        self._file.flush()

    def finish(self, total: int) -> int:
        """Write all records to the output in the order of the questions, complete or not at all; how many failed.

        Raises:
            DataError: a line has neither answer nor error.
        """
        records = dict(sorted(self._records(), key=lambda each: (each[0], "error" not in each[1])))
        missing = next((index for index in range(total) if index not in records), None)
        if missing is not None:
            raise DataError(f"{self.folder}: question {missing} has no answer; were files removed meanwhile?")
        with whole_file(self._output) as partial, partial.open("w", encoding="utf-8") as file:
            for index in range(total):
                file.write(_json(records[index]) + "\n")
        shutil.rmtree(self.folder)
        return sum("error" in record for record in records.values())

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # the last one of a killed rank may be cut short
                        noted = json.loads(line)
                        yield noted["index"], noted["record"]


def _json(value: object) -> str:
    """Readable, but for texts that hold half a character, which UTF-8 cannot say."""
    text = json.dumps(value, ensure_ascii=False)
    whole = text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
    return text if whole else json.dumps(value)


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())
