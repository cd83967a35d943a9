"""The benchmark of shard reads runs as committed, on a few small shards."""

import json
from pathlib import Path

import pytest

from benchmarks import shards


def test_small(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--shards", "24", "--samples-per-shard", "50", "--per-gpu", "8", "--rate", "10"]
    shards.main([*options, "--gpus", "1", "4", "--node", "2", "--steps", "3", "--json", str(figures)])
    one, four = json.loads(figures.read_text())
    assert one["rank_shards_in_a_step"] == one["node_shards_in_a_step"] == one["all_shards_in_a_step"] <= 8
    assert four["rank_shards_in_a_step"] <= four["node_shards_in_a_step"] <= four["all_shards_in_a_step"] <= 24
    assert four["node_shards_in_all"] <= four["all_shards_in_all"] <= 24
    assert four["node_mb_s"] == pytest.approx(2 * 10 * 0.060)
    assert four["fetched_mb_s"] == pytest.approx(four["node_shards_in_all"] * 50 * 0.060 / (3 * 8 / 10))
