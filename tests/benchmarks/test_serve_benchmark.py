"""The benchmark of the server runs as committed, on a tiny model."""

import json
import math
from pathlib import Path

import pytest
from helpers.loaded_model import exported, tiny_recipe, trained_run

from benchmarks import serve

__all__ = ["exported", "tiny_recipe", "trained_run"]


def test_small(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With more clients than places, so that some are refused; every answer and every refusal is counted."""
    figures = tmp_path / "figures.json"
    options = ["--batches", "2", "--clients", "1", "8", "--seconds", "1", "--tokens", "40", "--json", str(figures)]
    serve.main([str(exported), *options, "--max-waiting", "1", "--dtype", "fp32"])
    one, many = json.loads(figures.read_text())
    assert (one["batch"], one["clients"], one["refused"]) == (2, 1, {})
    assert many["refused"].keys() == {"429"} and many["answered"] >= 3
    for row in (one, many):
        assert 0 < row["first_text"][0] <= row["latency"][0] <= row["latency"][1] and row["tokens_cpu_s"] > 0
    assert math.isnan(serve.percentile([], 0.5)) and serve.percentile([1.0, 2.0, 3.0], 0.5) == 2
    assert capsys.readouterr().out.count("\n") == 5
