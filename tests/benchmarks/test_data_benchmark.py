"""The benchmark of the data path runs as committed, with a few images."""

import json
from pathlib import Path

import pytest

from benchmarks import data


def test_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    data.main(["--quick", "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert found["machine"]["cores"] >= 1
    rows = [(row["way"], *row["source"], row["target"], row["workers"]) for row in found["rows"]]
    ways = {data.ORIGINAL, data.WEBDATASET, data.PIXELS, data.EXACT, data.FAST, data.FEATURES, data.DECODE}
    assert {row for row in rows if row[4] == 0} == {
        (way, *source, target, 0) for way in ways for source in data.SOURCES for target in data.TARGETS
    }
    assert [row for row in rows if row[4]] == [(data.EXACT, 640, 480, 224, 1), (data.EXACT, 640, 480, 224, 2)]
    assert all(row["rate"] > 0 for row in found["rows"])
    shown = capsys.readouterr().out
    assert shown.count(data.ORIGINAL) == 4
    assert " 1.00 " in next(line for line in shown.splitlines() if line.startswith(data.ORIGINAL))
