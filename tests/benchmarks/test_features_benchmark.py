"""The benchmark of training from features runs with a tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks import features


def test_both_ways_and_the_published_share(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    features.main(["--size", "tiny", "--batch-size", "2", "--steps", "1", "--json", str(figures)])
    short, long = json.loads(figures.read_text())["rows"]
    for row in (short, long):
        assert row["same_loss"]
        assert row["ratio"] == pytest.approx(row["pixels"] / row["features"])
        assert row["images_per_second"] > 0
    assert long["published_ratio"] > short["published_ratio"] > 1.5


def test_the_published_ratio() -> None:
    """The parameters that an image and a sample pass through, per row, are nearly all of the operations."""
    vit = 257 * 2 * 39 * (4 * 1408**2 + 2 * 1408 * 6144)
    phi = 52 * 4 * 32 * 12 * 2560**2
    assert features.flops_ratio(features.TinyGPTVConfig(), 20) == pytest.approx(1 + vit / phi, rel=0.1)
