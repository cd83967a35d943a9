"""Answers on disk while they are generated: one journal per rank, so that a killed job can resume. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.files import (
    FileLock,
    Journal,
    LocksUnsupportedError,
    fingerprint_differences,
    json_line,
    lock_file,
    read_journal,
    whole_file,
    write_atomically,
)

_FINGERPRINT = "job.json"


class AnswerFiles:
    """The folder `OUTPUT.parts`, in which each rank appends to a journal, and the file `OUTPUT` made of all of them.

    Only answers count as done: questions that ended in an error are asked again when a job resumes.

    Args:
        output: the file of all answers.
        rank: this rank.
    """

    def __init__(self, output: Path, rank: int) -> None:
        self._output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self._journal_path = self.folder / f"rank-{rank:05d}.jsonl"
        self._lock: FileLock | None = None

    def open_folder(self, fingerprint: Mapping[str, Any]) -> None:
        """Create the folder, or check that it belongs to the same job: the same questions, model and settings.

        Raises:
            ConfigError: it belongs to another job; names the settings that differ.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded = self.folder / _FINGERPRINT
        if not recorded.is_file():
            write_atomically(recorded, json.dumps(fingerprint, indent=2).encode())
            return
        differing = fingerprint_differences(json.loads(recorded.read_text(encoding="utf-8")), fingerprint)
        if differing:
            raise ConfigError(
                f"{self.folder} holds answers of a job that differs in {', '.join(sorted(differing))}; repeat that "
                "job's command to resume it, remove the folder to start again, or choose another --output"
            )

    def done(self) -> set[int]:
        """Return the indexes of all questions that any rank, of this or an earlier run, has answered."""
        return {index for index, record in self._records() if "error" not in record}

    def __enter__(self) -> Self:
        """Open this rank's journal.

        Raises:
            LockedError: another process runs the same job.
        """
        with suppress(LocksUnsupportedError):  # without file locks nothing keeps the user from starting a job twice
            self._lock = lock_file(self._journal_path)
        self._journal = Journal(self._journal_path)
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def write(self, index: int, record: Mapping[str, Any]) -> None:
        """Append the fields of one question with its answer or error."""
        self._journal.append({"index": index, "record": record})

    def finish(self, total: int) -> int:
        """Write all records to the output in the order of the questions, atomically; return how many are errors.

        Raises:
            DataError: a question has neither an answer nor an error.
        """
        records = dict(sorted(self._records(), key=lambda entry: (entry[0], "error" not in entry[1])))
        missing = next((index for index in range(total) if index not in records), None)
        if missing is not None:
            raise DataError(
                f"{self.folder}: question {missing} has no answer, perhaps because files were removed; repeat the "
                "command to resume"
            )
        with whole_file(self._output) as partial, partial.open("w", encoding="utf-8") as file:
            for index in range(total):
                file.write(json_line(records[index]) + "\n")
        shutil.rmtree(self.folder)
        return sum("error" in record for record in records.values())

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for entry in read_journal(path):
                yield entry["index"], entry["record"]
