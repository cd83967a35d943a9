"""Tables of a user: CSV, where quotes hold commas and line breaks, and TSV, which knows no quoting."""

import csv
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import Row, SkipEntry
from tinygptv_ds.errors import DataError


def read_table(table: Path) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns, as {column: cell}; missing cells are None.

    Raises DataError, naming the line, if it is not UTF-8, if a quote is not closed, or if it has no header.
    """
    is_tsv = table.suffix.lower() == ".tsv"
    rows = _tab_separated(table) if is_tsv else _comma_separated(table)
    _, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise DataError(
            f"{table}: line 1 names one column, {header[0]!r}; separate columns with commas, in a .tsv with tabs"
        )
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise DataError(f"{table}: line 1 names a column twice: {', '.join(named)}")
    advice = (
        "a TSV cannot hold tabs or line breaks in a cell; save it as CSV" if is_tsv else 'write "quotes" around commas'
    )
    opened = 0  # the line before, if its last cell opens a quote
    for line, cells in rows:
        where = f"{table.name}: line {line}"
        opens = is_tsv and cells[-1].startswith('"') and not _in_quotes(cells[-1])
        if len(cells) < len(header) and (opened or opens):
            raise DataError(f"{table}: line {opened or line}: a cell in quotes continues on the next line; {advice}")
        opened = line if opens else 0
        if any(cells[len(header) :]):
            yield Row(
                where, SkipEntry("bad_record", f"{len(cells)} cells, the header has {len(header)}; {advice}: {cells}")
            )
        else:
            yield Row(where, {name: cell for name, cell in zip_longest(header, cells[: len(header)]) if name})


def _text_lines(table: Path) -> Iterator[str]:
    try:
        with table.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{table}: line {number} is not UTF-8 ({error.reason}); save it as UTF-8"
                    ) from error
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror}") from error


def _comma_separated(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each row begins, and its cells."""
    read: list[str] = []

    def lines() -> Iterator[str]:
        for line in _text_lines(table):
            read.append(line)
            yield line

    reader = csv.reader(lines(), strict=True)
    before = 0
    try:
        for cells in reader:
            if cells:
                yield before + 1, cells
            before = reader.line_num
            read.clear()
    except csv.Error as error:
        opened = _open_quote("".join(read))
        if opened is None:
            raise DataError(f"{table}: line {reader.line_num}: {error}") from error
        raise DataError(
            f"{table}: line {before + 1 + opened}: a quote opens here that is not closed, or has text after it; "
            f'write quotes within a cell twice, as in "a ""big"" ball", and the cell in quotes'
        ) from error


def _open_quote(row: str) -> int | None:
    """Return the number of the line, from 0, on which the first cell of a broken row opens that is not closed."""
    for cell in re.finditer(r'(?:(?<=[,\n])|^)"(?:[^"]|"")*(?P<closed>"(?=[,\r\n]|$))?', row):
        if cell["closed"] is None:
            return row.count("\n", 0, cell.start())
    return None


def _tab_separated(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line, and its cells as they are; a header in quotes says that all cells have them."""
    quoted = False
    for number, line in enumerate(_text_lines(table), 1):
        cells: list[Any] = line.rstrip("\r\n").split("\t")
        if number == 1:
            quoted = all(_in_quotes(cell) for cell in cells)
        if cells != [""]:
            yield number, [_unquoted(cell) if quoted or '""' in cell[1:-1] else cell for cell in cells]


def _in_quotes(cell: str) -> bool:
    """Return whether a cell is in quotes as tables write them, with every quote within it twice."""
    return len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _in_quotes(cell) else cell
