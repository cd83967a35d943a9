"""A user's annotation files and caption folders of every kind: read correctly, or reported with file and line."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from tinygptv_ds.data.prepare.prepare import prepare
from tinygptv_ds.data.prepare.prepare_report import PrepareReport
from tinygptv_ds.data.prepare.stored_images import Encoding
from tinygptv_ds.data.sets.own_rows import read_rows
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.data.shards.reader import RawSample, ShardReader
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.processing.image import open_image

ENTRY = {"image": "a.jpg", "question": "What?", "answer": "A ball."}


def image(kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((8, 6)).convert(mode).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    for name in "abc":
        (root / f"{name}.jpg").write_bytes(image())
    return root


def read_all(out: Path) -> list[RawSample]:
    reader = ShardReader()
    return [reader.read(tar, i) for tar in sorted(out.glob("*.tar")) for i in range(sample_count(tar))]


def captions(root: Path) -> tuple[dict[str, str], PrepareReport]:
    """Return the captions of a prepared caption folder by image, and the report."""
    report = prepare("caption-folder", root, root.parent / "out")
    return {sample.record["id"]: sample.record["caption"] for sample in read_all(root.parent / "out")}, report


# ---- JSON, JSON lines ------------------------------------------------------------------------------------------------

TWO = [ENTRY, {**ENTRY, "id": 2}]
LINES = "\n".join(map(json.dumps, TWO))
DOCUMENTS = {
    "a list": json.dumps(TWO),
    "an indented list": json.dumps(TWO, indent=2),
    "an object that holds it": json.dumps({"info": {}, "data": TWO}),
    "by id": json.dumps({"1": ENTRY, "2": ENTRY}),
    "lines": LINES,
    "lines with a blank one": LINES.replace("\n", "\n\n") + "\n",
    "lines of Windows": LINES.replace("\n", "\r\n"),
    "a byte order mark": "\ufeff" + json.dumps(TWO),
    "lines behind a byte order mark": "\ufeff" + LINES,
    "COCO": json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 7, "question": "What?", "answer": "A ball."}] * 2,
        }
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("ending", ["json", "jsonl", "txt"])
def test_json_is_recognized_by_its_content(name: str, ending: str, root: Path, tmp_path: Path) -> None:
    (root / f"mine.{ending}").write_text(DOCUMENTS[name], encoding="utf-8")
    report = prepare("llava", root, tmp_path / "out", annotations=root / f"mine.{ending}")
    assert (report.samples, report.with_images, report.skipped) == (2, 2, {})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b"<html>", "is neither JSON nor JSON lines; it begins with '<html>'"),
        ("a.json", json.dumps(TWO, indent=1).encode()[:-9], "is cut short: .* in line 11, column"),
        ("a.json", b'[{"image": "a.jpg",\n "question": }]', "is no JSON: Expecting value in line 2, column 14"),
        ("a.json", b'[{"image": "a.jpg",\n "question": "\xe9"}]', "line 2 is not UTF-8; save it as UTF-8"),
        ("a.json", json.dumps(TWO).encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        ("a.json", b"3", "begins with '3'"),
        ("a.json", b'{"info": {}, "licenses": 3}', "holds no list of entries"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.csv", b"file_name,caption\na.jpg,caf\xe9\n", "a.csv: line 2 is not UTF-8"),
        ("a.csv", "file_name,caption\na.jpg,x\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", b"file_name,caption,caption\na.jpg,x,y\n", "line 1 names a column twice"),
        ("a.csv", b"file_name;caption\na.jpg;a bat, red\n", "line 1 names one column, 'file_name;caption'; separate"),
    ],
)
def test_files_that_cannot_be_read(name: str, data: bytes, message: str, root: Path, tmp_path: Path) -> None:
    """Say where and what to do; nobody is sent to fetch an intact file again."""
    (root / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        prepare("llava", root, tmp_path / "out", annotations=root / name)
    assert "fetch it again" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_broken_first_line(root: Path, tmp_path: Path) -> None:
    (root / "mine.jsonl").write_text("{cut\n" + LINES + "\n" + '{"image": "\udce9"}', errors="surrogateescape")
    report = prepare("llava", root, tmp_path / "out")
    assert (report.samples, report.skipped) == (2, {"bad_record": 2})
    assert [entry["detail"][:14] for entry in report.skipped_entries] == ["mine.jsonl:1: ", "mine.jsonl:4: "]
    assert "save the file as UTF-8" in report.skipped_entries[1]["detail"]


def test_samples_with_and_without_images_are_counted(root: Path, tmp_path: Path) -> None:
    text = {"question": "What?", "answer": "A ball."}
    (root / "mine.json").write_text(json.dumps([ENTRY, text, text]))
    report = prepare("llava", root, tmp_path / "out")
    assert "3 samples (1 with images, 2 without)" in str(report)


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(root: Path, name: str, *lines: str) -> None:
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def test_rows_with_other_numbers_of_cells(root: Path) -> None:
    table(root, "c.csv", "file_name,caption", "a.jpg,a ball, red and round", "b.jpg,a bat,", '"c.jpg","a cat, grey"')
    found, report = captions(root)
    assert found == {"b.jpg": "a bat", "c.jpg": "a cat, grey"}
    assert report.skipped == {"bad_record": 1}
    assert "c.csv: line 2: 3 cells, the header has 2" in report.skipped_entries[0]["detail"]


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (['a.jpg,"a ""big"" ball"', 'b.jpg,"unclosed, a bat', "c.jpg,a cat"], 3),
        (['a.jpg,"a ball', 'b.jpg,"a bat"', "c.jpg,a cat"], 2),
        (['a.jpg,"two', 'lines"', '"b.jpg","a "big" bat"'], 4),
        (['"a.jpg","two', 'lines"', '"b', '.jpg","unclosed', "c.jpg,a cat"], 5),
        (['a.jpg,"' + "a ball\n" * 30_000], 2),
    ],
)
def test_quotes_that_swallow_lines(lines: list[str], line: int, root: Path) -> None:
    """The message names the line on which the quote opens, however many lines it swallows."""
    table(root, "c.csv", "file_name,caption", *lines)
    with pytest.raises(DataError, match=rf"c\.csv: line {line}: a quote opens here"):
        captions(root)


def test_tsv_knows_no_quoting(root: Path, tmp_path: Path) -> None:
    rows = ['a.jpg\t"Hello" said the ball', 'b.jpg\ta 12" ruler', 'c.jpg\t"open quote']
    table(root, "c.tsv", "file_name\tcaption", *rows)
    found, _ = captions(root)
    assert found == {row.split("\t")[0]: row.split("\t")[1] for row in rows}
    table(root, "c.tsv", '"file_name"\t"caption"', '"a.jpg"\t"a ""big"" ball"', '"b.jpg"\t"a bat"')
    prepare("caption-folder", root, tmp_path / "quoted")
    assert [sample.record["caption"] for sample in read_all(tmp_path / "quoted")] == ['a "big" ball', "a bat"]
    for header, *lines in (
        ["file_name\tcaption", 'a.jpg\t"two', 'lines"', "b.jpg\ta bat"],
        ["caption\tfile_name", '"two', 'lines"\ta.jpg', "a bat\tb.jpg"],
    ):
        table(root, "c.tsv", header, *lines)
        with pytest.raises(DataError, match=r"c\.tsv: line 2: .* continues on the next line.*save it as CSV"):
            prepare("caption-folder", root, tmp_path / "two_lines", annotations=root / "c.tsv")


def test_captions_that_stand_for_none(root: Path) -> None:
    table(root, "c.csv", "file_name,caption", "a.jpg,nan", "b.jpg,NaN", "c.jpg,", "c.jpg,a nan bread")
    found, report = captions(root)
    assert (found, report.skipped) == ({"c.jpg": "a nan bread"}, {"empty_answer": 3})


def test_tables_of_questions_and_renamed_columns(root: Path, tmp_path: Path) -> None:
    table(root, "c.csv", "bild,frage,antwort,thumb", "a.jpg,What?,A ball.,b.jpg")
    columns = {"bild": "image", "frage": "question", "antwort": "answer", "thumb": ""}
    prepare("llava", root, tmp_path / "out", columns=columns)
    (sample,) = read_all(tmp_path / "out")
    assert (sample.record["text"], sample.record["answer"], len(sample.images)) == ("What?", "A ball.", 1)


def test_image_folders_of_hugging_face(root: Path, tmp_path: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a ball"}\n')
    found, _ = captions(root)
    assert found == {"a.jpg": "a ball"}
    for part, kind in (("train", "jsonl"), ("more", "csv")):  # a split a folder, whose paths start there
        (root / part).mkdir()
        (root / "a.jpg").rename(root / part / "a.jpg") if part == "train" else (root / "b.jpg").rename(
            root / "more/a.jpg"
        )
        text = '{"file_name": "a.jpg", "text": "train"}' if kind == "jsonl" else "file_name,text\na.jpg,more\n"
        (root / part / f"metadata.{kind}").write_text(text)
    (root / "metadata.jsonl").unlink()
    prepare("caption-folder", root, tmp_path / "splits")
    assert [sample.record["caption"] for sample in read_all(tmp_path / "splits")] == ["more", "train"]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t\x00\ufeff"), min_size=1, max_size=9)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["csv", "tsv"]))
def test_any_table_that_is_written_well_is_read(rows: list[tuple[str, str]], ending: str) -> None:
    import csv
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"t.{ending}")
        with path.open("w", encoding="utf-8", newline="") as file:
            if ending == "csv":
                csv.writer(file).writerows([("a", "b"), *rows])
            else:
                rows = [tuple(cell.replace('"', "'") for cell in row) for row in rows]
                file.write("\n".join("\t".join(row) for row in (("a", "b"), *rows)))
        found, total = read_rows(path)
        assert [row.value for row in found] == [{"a": a, "b": b} for a, b in rows]
    assert total == len(rows)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_caption_files(root: Path) -> None:
    """Every usual name, UTF-8 alone; what systems leave behind is passed by."""
    files = {
        "a.txt": b"\xef\xbb\xbfa red card\r\nsecond line\r\n",
        "b.TXT": b"upper case",
        "c.jpg.txt": b"name with jpg.txt",
        "d.caption": b"dot caption",
        "e.txt": b"",
        "f.txt": b"  \n ",
        "g.txt": "café".encode("cp1252"),
        "h.txt": "café".encode("utf-16"),
        "i.txt": b"one",
        "i.caption": b"another",
        "j.final.txt": b"dotted<|endoftext|>",
        "l.txt": b"an <image> of a ball",
        "lonely.txt": b"without an image",
        ".ipynb_checkpoints/a-checkpoint.txt": b"hidden",
        "__MACOSX/a.txt": b"hidden",
        "._a.txt": b"hidden",
    }
    for name in "defghil":
        (root / f"{name}.jpg").write_bytes(image())
    (root / "j.final.jpg").write_bytes(image())
    (root / "k.jpeg").write_bytes(image())
    for name in (".ipynb_checkpoints/a-checkpoint", "__MACOSX/a", "._a"):
        (root / f"{name}.jpg").parent.mkdir(exist_ok=True)
        (root / f"{name}.jpg").write_bytes(b"no image")
    for name, data in files.items():
        (root / name).write_bytes(data)
    found, report = captions(root)
    assert found == {
        "a.jpg": "a red card\r\nsecond line" if found["a.jpg"].count("\r") else "a red card\nsecond line",
        "b.jpg": "upper case",
        "c.jpg": "name with jpg.txt",
        "d.jpg": "dot caption",
        "j.final.jpg": "dotted",
    }
    assert report.skipped == {
        **{"empty_answer": 2, "unreadable_caption": 2, "ambiguous_caption": 1},
        **{"missing_caption": 1, "missing_image": 1, "mark_in_answer": 1},
    }
    assert report.notes == {"end_token_removed": 1}
    details = {entry["detail"] for entry in report.skipped_entries}
    assert sum("save it as UTF-8" in detail for detail in details) == 2


def test_another_image_in_the_folder_is_noticed(root: Path, tmp_path: Path) -> None:
    for name in "ab":
        (root / f"{name}.txt").write_text(name)
    assert prepare("caption-folder", root, tmp_path / "out").skipped == {"missing_caption": 1}
    assert prepare("caption-folder", root, tmp_path / "out").reused
    (root / "c.txt").write_text("c")
    with pytest.raises(DataError, match=r"other settings \(files\)"):
        prepare("caption-folder", root, tmp_path / "out")


def test_images_of_every_kind(tmp_path: Path) -> None:
    """What can be decoded is used, whatever its name; the rest is counted by what it is."""
    root = tmp_path / "root"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a.jp2": image("JPEG2000"),
        "a.tga": image("TGA"),
        "named.jpg": image("WEBP"),
        "no_ending": image("PNG"),
        "deep.png": image("PNG", "I;16"),
        "clear.png": image("PNG", "LA"),
        "side.jpg": image(exif=exif),
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(100),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "page.jpg": b"<html>",
    }
    if features.check("avif"):
        files["a.avif"] = image("AVIF")
    for name, data in files.items():
        (root / name).write_bytes(data)
        (root / Path(name).with_suffix(".txt")).write_text("a ball")
    found, report = captions(root)
    assert set(files) - set(found) == {"phone.heic", "drawing.svg", "page.jpg"}
    assert report.skipped == {"unsupported_image": 2, "not_an_image": 1}
    assert report.notes == {"scaled_to_8_bit": 1, "laid_on_background": 1, "turned_upright": 1}
    assert "changed: 1 laid_on_background" in str(report)
    stored = {sample.record["id"]: sample.images[0] for sample in read_all(tmp_path / "out")}
    assert open_image(stored["side.jpg"]).size == (6, 8)


def test_background(root: Path, tmp_path: Path) -> None:
    """White for own data, another color or as in the original if asked; published datasets are left alone."""
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(out, "PNG")
    (root / "a.jpg").write_bytes(out.getvalue())
    (root / "mine.json").write_text(json.dumps([ENTRY]))
    for name, color in ((None, (255, 255, 255)), ("#102030", (16, 32, 48)), ("none", (0, 0, 0))):
        prepare("llava", root, tmp_path / str(name), encoding=Encoding(background=name))
        (sample,) = read_all(tmp_path / str(name))
        assert open_image(sample.images[0]).getpixel((0, 0)) == color
        assert (sample.images[0] == out.getvalue()) == (name == "none")
    (root / "cc_sbu_align").mkdir()
    (root / "cc_sbu_align/filter_cap.json").write_text('{"annotations": [{"image_id": "a", "caption": "x"}]}')
    (root / "cc_sbu_align/image").symlink_to(root)
    prepare("cc_sbu_align", root, tmp_path / "published")
    (sample,) = read_all(tmp_path / "published")
    assert sample.images == (out.getvalue(),)
    with pytest.raises(ConfigError, match="is no color"):
        Encoding(background="greenish")


# ---- parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_without_its_package(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (root / "train.parquet").write_bytes(b"PAR1...PAR1")
    with pytest.raises(DataError, match=r"pip install 'tinygptv_ds\[parquet\]'"):
        prepare("llava", root, tmp_path / "out")


def test_parquet(root: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": image("PNG"), "path": None}, "question": "What?", "answers": ["A ball.", "ball"]},
        {"image": {"bytes": None, "path": "a.jpg"}, "question": "What?", "answers": ["A ball."]},
    ]
    for number in range(2):
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"train-0000{number}-of-00002.parquet")
    report = prepare("llava", root, tmp_path / "out", samples_per_shard=3)
    assert (report.samples, report.with_images) == (4, 4)
    assert [sample.images for sample in read_all(tmp_path / "out")][:2] == [(image("PNG"),), (image(),)]
    (root / "train-00001-of-00002.parquet").unlink()
    whole = (root / "train-00000-of-00002.parquet").read_bytes()
    (root / "train-00000-of-00002.parquet").write_bytes(whole[:-30])
    with pytest.raises(DataError, match="damaged parquet file, or cut short"):
        prepare("llava", root, tmp_path / "cut")
