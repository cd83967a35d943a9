"""The benchmark of inference answers with a tiny model, and its figures are there."""

from pathlib import Path

import pytest

from benchmarks.inference import figures, show
from benchmarks.made_up import make_weights


def test_a_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = figures("bf16, LoRA merged", str(make_weights(tmp_path, "tiny").recipe), tokens=4)
    assert all(row[name] > 0 for name in ("load", "first_token", "tokens_s", "tokens_s_together"))
    assert 0 < row["peak_loading"] <= row["peak"]
    show(row)
    assert capsys.readouterr().out.startswith("bf16, LoRA merged ")
