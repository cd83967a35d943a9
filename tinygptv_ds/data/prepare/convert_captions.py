"""The commands ``convert-laion`` and ``convert-cc-sbu``: BLIP's caption JSON -> the TSV that img2dataset reads."""

import argparse
import csv
import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tinygptv_ds.errors import DataError
from tinygptv_ds.files import whole_file

FILES = {
    "convert-laion": "laion_synthetic_filtered_large.json",
    "convert-cc-sbu": "ccs_synthetic_filtered_large.json",
}
_DECODER = json.JSONDecoder()
_BLOCK = 1 << 20  # characters
_LARGEST = 1 << 24  # characters of one entry; a longer one is broken


class Captioned(NamedTuple):
    """One entry of the list: its number, and the character of the file at which it starts, both counted from 0."""

    number: int
    start: int
    entry: dict[str, Any]


def convert_captions(source: Path, out: Path) -> int:
    """Write the objects of the JSON list `source` as rows of the TSV `out`; return their number.

    The header is the keys of the first object, and the bytes are those of Python's ``csv.writer`` (tab, ``\\r\\n``,
    quotes where needed), as in the original. Takes a few MB of memory however long the list is.

    Raises DataError, with nothing written, if `out` exists, or if `source` is cut, is not a list, or has an entry that
    is not an object or has other keys.
    """
    if out.exists():
        raise DataError(f"{out} is already there; choose another --out")
    try:
        with (
            source.open("rb") as file,
            whole_file(out) as partial,
            partial.open("w", encoding="utf-8", newline="") as tsv,
        ):
            return _write(source, _with_progress(source, file), tsv)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from error


def _write(source: Path, text: Iterator[str], tsv: io.TextIOBase) -> int:
    writer = csv.writer(tsv, delimiter="\t")
    entries = _entries(source, text)
    first = next(entries, None)
    if first is None:
        raise DataError(f"{source}: the list is empty")
    writer.writerow(first.entry)
    for number, start, entry in chain([first], entries):
        if entry.keys() != first.entry.keys():
            keys, expected = (", ".join(found) or "none" for found in (entry, first.entry))
            raise DataError(f"{source}: entry {number} (at character {start}) has keys {keys}, the first {expected}")
        try:
            writer.writerow([entry[key] for key in first.entry])
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: entry {number} (at character {start}) holds half a character, which no UTF-8 file can: "
                f"{error.object[:80]!r}"
            ) from error
    return number + 1


def _with_progress(source: Path, file: io.BufferedReader) -> Iterator[str]:
    """Yield the file's text block by block, with a progress bar of bytes."""
    reader = io.TextIOWrapper(file, encoding="utf-8-sig")
    with tqdm(desc=source.name, total=source.stat().st_size, unit="B", unit_scale=True, disable=None) as bar:
        try:
            while text := reader.read(_BLOCK):
                bar.update(file.tell() - bar.n)
                yield text
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: is not UTF-8 before byte {file.tell()}: {error.reason}") from error


class _Text:
    """A window on the text that moves forward; `at` is the next character in it."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self.window, self.at, self._before = "", 0, 0

    @property
    def position(self) -> int:
        return self._before + self.at

    @property
    def left(self) -> int:
        return len(self.window) - self.at

    def more(self) -> bool:
        """Add a block and drop what has been read; return False at the end of the file."""
        block = next(self._blocks, "")
        self._before += self.at
        self.window, self.at = self.window[self.at :] + block, 0
        return bool(block)

    def next_character(self) -> str:
        """Return the next character that is not white space, without consuming it; empty at the end of the file."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.window) or not self.more():
                return self.window[self.at : self.at + 1]


def _entries(source: Path, blocks: Iterator[str]) -> Iterator[Captioned]:
    """Yield the objects of the list, one at a time."""
    text = _Text(blocks)
    if text.next_character() != "[":
        raise DataError(f"{source}: is no JSON list; is it the right file?")
    text.at += 1
    closed = text.next_character() == "]"
    text.at += closed
    number = 0
    while not closed:
        yield _entry(source, text, number)
        number += 1
        separator = text.next_character()
        if separator not in (",", "]"):
            found = f"has {separator!r} at character {text.position}" if separator else "ends"
            raise DataError(f"{source}: {found} after {number} entries, instead of a comma or the closing bracket")
        text.at += 1
        closed = separator == "]"
    if text.next_character():
        raise DataError(f"{source}: has more text after the list, at character {text.position}; fetch it again")


def _entry(source: Path, text: _Text, number: int) -> Captioned:
    if text.next_character() != "{":
        raise DataError(f"{source}: at character {text.position}, where entry {number} is due, is no object")
    while True:
        try:
            entry, end = _DECODER.raw_decode(text.window, text.at)
        except (ValueError, RecursionError) as error:
            message = getattr(error, "msg", str(error))
            where = text.position + getattr(error, "pos", text.at) - text.at
            if text.left <= _LARGEST and text.more():
                continue
            raise DataError(
                f"{source}: entry {number} (at character {text.position}) is cut or broken ({message}) "
                f"at character {where}; fetch it again"
            ) from error
        found = Captioned(number, text.position, entry)
        text.at = end
        return found


# ---- the commands ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both commands."""
    names = ", ".join(FILES.values())
    parser.add_argument("--json", type=Path, help=f"BLIP's list of captions (default: here, of {names}, the command's)")
    parser.add_argument("--out", type=Path, help="the TSV (default: of the same name, in the current folder)")


def run(args: argparse.Namespace) -> None:
    """Run the command `args.verb` and print the number of rows."""
    source = args.json or Path(FILES[args.verb])
    out = args.out or Path(source.with_suffix(".tsv").name)
    print(f"{out}: {convert_captions(source, out):,} rows")
