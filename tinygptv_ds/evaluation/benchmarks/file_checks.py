"""Reading of benchmark files, which collects everything that is missing or wrong for one error. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import load_json
from tinygptv_ds.errors import DataError

Fields = Mapping[str, type | tuple[type, ...]]
_LISTED = 3
_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object", float: "a number"}


class Checks:
    """Collects the problems of all benchmarks that are to be scored; `finish` raises them together."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        self._seen: dict[Path, bool] = {}
        self._missing: dict[str, list[Path]] = {}
        self._wanted: dict[str, set[Path]] = {}

    def problem(self, message: str) -> None:
        """Add a problem."""
        self._problems.append(message)

    def content(self, path: Path, option: str) -> Any:
        """Return the content of a JSON file, or a list of the lines of a `.jsonl` file; None if it cannot be read.

        Args:
            path: the file.
            option: the override that names another file, e.g. "gqa.questions=FILE".
        """
        if not path.is_file():
            self.problem(f"{path} is missing; put it there, or name another file with {option}")
            return None
        try:
            return load_json(path) if path.suffix != ".jsonl" else list(_lines(path))
        except DataError as error:
            self.problem(str(error))
            return None

    def entries(
        self,
        path: Path,
        content: Any,
        fields: Fields,
        also: Callable[[dict[str, Any]], str | None] = lambda entry: None,
    ) -> list[tuple[str, dict[str, Any]]]:
        """Return the valid entries of a list with their number, or of an object with their id.

        Args:
            path: the file, for messages.
            content: from `content`.
            fields: the fields that each entry must have, with their types.
            also: returns another problem of an entry, if it has one.
        """
        if content is None:
            return []
        if not isinstance(content, list | dict):
            self.problem(f"{path}: holds a {type(content).__name__}, neither a list of entries nor an object of them")
            return []
        pairs = list(content.items() if isinstance(content, dict) else enumerate(content))
        odd = [(number, why) for number, entry in pairs if (why := _odd(entry, fields) or also(entry))]
        for number, why in odd[:_LISTED]:
            self.problem(f"{path}: entry {number} {why}")
        if len(odd) > _LISTED:
            self.problem(f"{path}: {len(odd)} of {len(pairs)} entries are like these")
        if not pairs:
            self.problem(f"{path}: holds no entries")
        bad = {number for number, _ in odd}
        return [(str(number), entry) for number, entry in pairs if number not in bad]

    def image(self, option: str, *places: Path) -> Path:
        """Return the first of `places` that is a file; if none is, the first one, and add a problem for `option`."""
        found = next((place for place in places if self._is_file(place)), None)
        self._wanted.setdefault(option, set()).add(found or places[0])
        if found is None and places[0] not in self._missing.setdefault(option, []):
            self._missing[option].append(places[0])
        return found or places[0]

    def finish(self) -> None:
        """Raise DataError with all problems, if there are any."""
        images = [
            f"{len(missing)} of {len(self._wanted[option])} images are missing, the first: "
            f"{', '.join(str(path) for path in missing[:_LISTED])}; put them there, or name another folder with "
            f"{option}=FOLDER"
            for option, missing in self._missing.items()
            if missing
        ]
        problems = [*self._problems, *images]
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise DataError(f"{len(problems)} problem(s) with the benchmarks' files:\n{listed}")

    def _is_file(self, path: Path) -> bool:
        if path not in self._seen:
            self._seen[path] = path.is_file()
        return self._seen[path]


def _lines(path: Path) -> Iterator[Any]:
    """Yield one JSON value per line, without empty lines. Raises DataError."""
    try:
        lines: Iterable[bytes] = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON ({error}); download it again") from error


def _odd(entry: Any, fields: Fields) -> str | None:
    """Return what is wrong with an entry; None if nothing is."""
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not an object"
    for field, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if field not in entry:
            return f"has no {field!r}"
        value = entry[field]
        if not isinstance(value, kinds) or isinstance(value, bool):
            return f"has {str(value)[:60]!r} as {field!r}, which must be {' or '.join(_NAMES[each] for each in kinds)}"
    return None
