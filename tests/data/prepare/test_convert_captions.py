"""BLIP's caption JSON to a TSV: the original's bytes, constant memory, and what is wrong with a file."""

import csv
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptv_ds.data.prepare import convert_captions as module
from tinygptv_ds.data.prepare.convert_captions import FILES, convert_captions
from tinygptv_ds.errors import DataError

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))


def originals(entries: list[dict]) -> bytes:
    """What the original's script makes of the list."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t")
    writer.writerow(entries[0].keys())
    writer.writerows([entry.values() for entry in entries])
    return out.getvalue().encode()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8")), VALUES), min_size=1),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(3, 100),
)
def test_the_bytes_are_the_originals(values: list, indent: int | None, ascii_only: bool, block: int) -> None:
    """However the file is laid out, and wherever its blocks end."""
    entries = [dict(zip(("url", "caption"), pair, strict=True)) for pair in values]
    text = json.dumps(entries, indent=indent, ensure_ascii=ascii_only)
    blocks = (text[at : at + block] for at in range(0, len(text), block))
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    assert module._write(Path("x.json"), blocks, out) == len(entries)
    out.flush()
    assert out.buffer.getvalue() == originals(entries)


def test_columns_follow_the_first_object(tmp_path: Path) -> None:
    """The original would mix the columns up."""
    (tmp_path / "a.json").write_text('[{"url": "u", "caption": "c"}, {"caption": "d", "url": "v"}]')
    assert convert_captions(tmp_path / "a.json", tmp_path / "a.tsv") == 2
    assert (tmp_path / "a.tsv").read_bytes() == b"url\tcaption\r\nu\tc\r\nv\td\r\n"


def test_memory_is_constant(tmp_path: Path) -> None:
    """20 MB of entries in a tenth of that, where parsing the whole takes several times their size."""
    entry = json.dumps({"url": "http://example.org/" + "u" * 400, "caption": "some words " * 50})
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + entry)
        for _ in range(20_000_000 // len(entry)):
            file.write(", " + entry)
        file.write("]")
    tracemalloc.start()
    count = convert_captions(tmp_path / "a.json", tmp_path / "a.tsv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1 + 20_000_000 // len(entry)
    assert peak < 6 * module._BLOCK


GOOD = '{"url": "u", "caption": "c"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON list"),
        ('{"annotations": []}', "is no JSON list"),
        ("[]", "the list is empty"),
        (f"[{GOOD}, 5]", r"at character 31, where entry 1 is due, is no object"),
        (f"[{GOOD},]", "where entry 1 is due, is no object"),
        (f"[{GOOD}", "ends after 1 entries"),
        (f"[{GOOD}, ", "where entry 1 is due"),
        (f"[{GOOD}, {GOOD[:10]}", r"entry 1 \(at character 31\) is cut or broken .*at character 39"),
        (f"[{GOOD}, {{'url': 1}}]", "entry 1 .*at character 32"),
        (f"[{GOOD} {GOOD}]", "has '{' at character 30 after 1 entries"),
        (f"[{GOOD}] x", "has more text after the list, at character 31"),
        (f'[{GOOD}, {{"url": "u"}}]', r"entry 1 \(at character 31\) has keys url, the first url, caption"),
        (f'[{GOOD}, {{"url": "u", "caption": "\\ud83d"}}]', "entry 1 .*half a character"),
    ],
)
def test_broken_files_are_reported_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        convert_captions(tmp_path / "a.json", tmp_path / "a.tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_long_broken_entry_is_no_reason_to_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 100)
    monkeypatch.setattr(module, "_LARGEST", 1000)
    (tmp_path / "a.json").write_text('[{"url": 1 ' + " " * 100_000 + '"}]')
    blocks = []
    with pytest.raises(DataError, match="entry 0"):
        text = (tmp_path / "a.json").read_text()
        module._write(
            tmp_path, (blocks.append(at) or text[at : at + 100] for at in range(0, len(text), 100)), io.StringIO()
        )
    assert len(blocks) < 20


def test_not_utf_8_missing_and_present(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"url": "\xff"}]')
    with pytest.raises(DataError, match="is not UTF-8"):
        convert_captions(tmp_path / "a.json", tmp_path / "a.tsv")
    with pytest.raises(DataError, match="No such file"):
        convert_captions(tmp_path / "b.json", tmp_path / "a.tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "a.tsv").write_text("mine")
    with pytest.raises(DataError, match="already there"):
        convert_captions(tmp_path / "a.json", tmp_path / "a.tsv")
    assert (tmp_path / "a.tsv").read_text() == "mine"


@pytest.mark.parametrize("verb", FILES)
def test_command(verb: str, tmp_path: Path) -> None:
    """As in the original: no options, the published name, the TSV in the current folder."""
    command = [sys.executable, "-m", "tinygptv_ds", verb]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)

    missing = run()
    assert (missing.returncode, missing.stderr) == (2, f"error: {FILES[verb]}: No such file or directory\n")
    (tmp_path / FILES[verb]).write_text(f"[{GOOD}]")
    assert run().stdout == f"{FILES[verb].replace('.json', '.tsv')}: 1 rows\n"
    assert (tmp_path / FILES[verb]).with_suffix(".tsv").read_bytes() == b"url\tcaption\r\nu\tc\r\n"
