"""Images of a user with captions, in a text file next to each image or in one table."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinygptv_ds.data.sets.common import Built, Entry, Samples, SkipEntry, inside
from tinygptv_ds.data.sets.jsonl import count_lines
from tinygptv_ds.errors import DataError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_FILE_COLUMNS = ("file_name", "filename", "file", "image_path", "image", "filepath", "path")
_CAPTION_COLUMNS = ("caption", "text")


class CaptionRow(NamedTuple):
    """One row of a table: its cells by column, and the line on which it ends."""

    line: int
    cells: dict[str, str | None]

    def __str__(self) -> str:
        return str(self.cells)


def caption_folder(root: Path, annotations: Path | None = None, image_root: Path | None = None) -> Iterator[Entry]:
    """Yield the images and captions of the table `annotations`, or of the only ``*.csv`` or ``*.tsv`` in `root`;
    without one, every image below `root` with the caption in the text file of its name (``a.jpg``, ``a.txt``).

    The paths of a table start from `image_root` or `root`, which without a table is the folder of the images.
    """
    tables = [annotations] if annotations else sorted([*root.glob("*.csv"), *root.glob("*.tsv")])
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{root}: which table holds the captions? There are: {names}; name it with --annotations")
    return _table(tables[0], image_root or root) if tables else _text_files(image_root or root)


def _text_files(root: Path) -> Iterator[Entry]:
    images = sorted(path for path in root.rglob("*") if path.suffix.lower() in _IMAGES)
    if not images:
        raise DataError(f"{root}: holds neither a table of captions (.csv, .tsv) nor images ({', '.join(_IMAGES)})")

    def build(image: Path) -> Built:
        try:
            caption = image.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise SkipEntry("missing_caption", f"no {image.with_suffix('.txt').name} next to the image") from None
        except OSError as error:
            raise SkipEntry("unreadable_caption", f"{image.with_suffix('.txt').name}: {error.strerror}") from error
        return {"caption": caption, "clean": [], "id": str(image.relative_to(root))}, [image]

    return Samples(images, build, where=lambda _, image: str(image))


def _table(table: Path, images: Path) -> Iterator[Entry]:
    header = next(iter(_rows(table)), CaptionRow(1, {})).cells
    file_column, caption_column = _column(table, header, _FILE_COLUMNS), _column(table, header, _CAPTION_COLUMNS)

    def build(row: CaptionRow) -> Built:
        absent = [column for column in (file_column, caption_column) if not row.cells[column]]
        if absent:
            raise KeyError(absent[0])
        name, caption = row.cells[file_column], row.cells[caption_column]
        return {"caption": caption, "clean": [], "id": name}, [inside(images, name)]

    total = count_lines(table) - 1
    return Samples(_rows(table), build, total=total, where=lambda _, row: f"{table.name}: row up to line {row.line}")


def _column(table: Path, header: dict[str, str | None], names: tuple[str, ...]) -> str:
    known = {column.strip().lower(): column for column in header if column}
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        raise DataError(
            f"{table}: the first line must name the columns, one of them {' or '.join(names)}; "
            f"it names: {', '.join(known) or 'none, or no row follows'}"
        )
    return found


def _rows(table: Path) -> Iterator[CaptionRow]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            for cells in reader:
                yield CaptionRow(reader.line_num, cells)
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: is not UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{table}: line {reader.line_num + 1}: {error}") from error
