"""The benchmark of checkpoints runs as committed, on a tiny model."""

import json
from pathlib import Path

from helpers.forked import apart

from benchmarks import checkpoint


def test_small(tmp_path: Path) -> None:
    """In a process of its own, since it joins a process group."""
    figures = tmp_path / "figures.json"
    options = ["--size", "tiny", "--rounds", "1", "--folder", str(tmp_path), "--json", str(figures)]
    apart(checkpoint.main, options)
    row = json.loads(figures.read_text())
    assert row["gb"] > 0
    assert all(row[name] > 0 for name in row if name.endswith("_seconds"))
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
