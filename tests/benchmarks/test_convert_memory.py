"""The benchmark of converting runs as committed, with tiny weights."""

import json
from pathlib import Path

from benchmarks import convert_memory


def test_one_operation_of_each_kind(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    convert_memory.main(["--size", "tiny", "--only", "trained", "--json", str(figures), "--dir", str(tmp_path)])
    (row,) = json.loads(figures.read_text())["rows"]
    assert row["name"] == "export trained, fp32"
    assert row["output"] > 1000
    assert row["peak"] > row["output"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
