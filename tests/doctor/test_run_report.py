"""`doctor RUN`: what a run that hung has left, as written by torch's flight recorder and by hand."""

import os
import pickle
from pathlib import Path

import pytest
from helpers.verbs import call

from tinygptv_ds.doctor import local as doctor
from tinygptv_ds.doctor.run_report import run_report
from tinygptv_ds.errors import ConfigError


def entry(number: int, group: str = "default_pg") -> dict:
    """An entry as torch's pickles have it."""
    frames = [{"filename": "/x/torch/distributed/c10d.py", "line": 1}, {"filename": "/x/step.py", "line": 7}]
    return {
        "frames": frames,
        "process_group": ("0", group),
        "collective_seq_id": number,
        "profiling_name": "nccl:all_reduce",
        "input_sizes": [[2, 3]],
        "state": "started",
    }


def write(run_dir: Path, **entries: list[dict]) -> list[str]:
    """Write a record for each rank; return the lines of the report."""
    folder = run_dir / "stacks"
    folder.mkdir()
    (folder / "rank-0.txt").write_text("== 2026-01-01 rank 1 hangs; process 5\nThread ...\n== x; dataloader worker 6\n")
    for name, made in entries.items():
        (folder / f"collectives_{name}").write_bytes(pickle.dumps({"entries": made}))
    return list(run_report(run_dir))


def test_a_rank_is_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write(tmp_path, rank_0=[entry(1), entry(2)], rank_1=[entry(1)], rank_10=[entry(2)])
    assert "  rank-0.txt: 2026-01-01 rank 1 hangs; process 5" in lines
    assert "  rank 10: 2 begun, the last one nccl:all_reduce of 2x3 values, started, called in step.py, line 7" in lines
    assert "The others wait for rank 1, which has not reached the next collective: read its stacks." in lines
    assert lines[-1].startswith("All of them, under NCCL: torchfrtrace --prefix collectives_rank_ ")
    call(doctor, str(tmp_path))
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("other", "found"), [(entry(2), "All ranks have begun the same"), (entry(2, "dp"), "in different process groups")]
)
def test_no_rank_is_behind(other: dict, found: str, tmp_path: Path) -> None:
    lines = write(tmp_path, rank_0=[entry(2)], rank_1=[other])
    assert any(found in line for line in lines) and not any("The others wait" in line for line in lines)


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    """A torn one, and one that would run code."""
    lines = write(tmp_path, rank_0=[], rank_1=[entry(1)])
    torn, hostile = tmp_path / "stacks/collectives_rank_1", tmp_path / "stacks/collectives_rank_2"
    torn.write_bytes(torn.read_bytes()[:-20])
    hostile.write_bytes(pickle.dumps(os.getcwd))
    assert "  rank 0: 0 begun, the last one none" in lines
    report = "\n".join(run_report(tmp_path))
    assert "rank 1: collectives_rank_1 cannot be read" in report
    assert "rank 2: collectives_rank_2 cannot be read (refused: it names posix.getcwd)" in report


def test_runs_without_stacks(tmp_path: Path) -> None:
    assert "nothing there" in "\n".join(run_report(tmp_path))
    with pytest.raises(ConfigError, match="is no run directory"):
        list(run_report(tmp_path / "no"))
