"""The benchmark of the sample order runs as committed, on a few small shards."""

import json
from pathlib import Path

from benchmarks import stream


def test_small(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--samples-per-shard", "50", "--ranks", "4", "--per-rank", "8", "--steps", "2"]
    stream.main(["--shards", "10", "30", *options, "--json", str(figures)])
    rows = json.loads(figures.read_text())["rows"]
    assert [row["samples"] for row in rows] == [500, 1500]
    assert all(row["plan_seconds"] > 0 and row["imbalance"] < 0.2 for row in rows)
