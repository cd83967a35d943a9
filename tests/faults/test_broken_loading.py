"""Dataloader workers that are killed or hang, storage that fails: the same samples, or a message that says why not."""

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import Ranks, ended
from rank_faults import fed, watched
from rank_workers import broken_workers, failing_reads


@pytest.fixture
def recipe(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of four micro-batches a step, with a dataloader worker and without a panel."""

    def write(**changes: Any) -> Path:
        raw = raw_recipe(**{"train__sample_count": 0, "data__num_workers": 1} | changes)
        return tiny.write_recipe(tmp_path / "recipe.yaml", raw)

    return write


def losses(run: Ranks) -> list[float]:
    return [line["train/loss"] for line in run.metrics]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", r"was killed by SIGKILL, most often by the system because memory ran out \(see dmesg\)"),
        ("hanging", r"has given nothing for 2 s \(data.read_timeout_seconds\)"),
    ],
)
def test_a_loader_process(how: str, said: str, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Another worker continues at the same place, with the same samples and losses, bit for bit, and one warning."""
    path, marks = recipe(data__read_timeout_seconds=2), tmp_path / "marks"
    marks.mkdir()
    whole = ended(path, tmp_path / "whole", fault=watched)
    broken = ended(path, tmp_path / "broken", fault=broken_workers, how=how, at=3, times=1, marks=str(marks))
    assert fed(broken.folder, 1) == fed(whole.folder, 1) and len(fed(whole.folder, 1)) == 6
    assert losses(broken) == losses(whole)
    (mark,) = marks.iterdir()
    warned = rf"dataloader worker 1 of 1 \(process {mark.name}\) {said}, while step [34] was awaited; new ones start at"
    assert len(re.findall(warned, broken.output)) == 1 and "Traceback" not in broken.output
    stacks = broken.folder / "stacks/rank-0.txt"
    assert stacks.exists() == (how == "hanging")
    if how == "hanging":  # where it hung
        assert f"dataloader worker {mark.name}, state S" in stacks.read_text()
        assert re.search(r'rank_workers.py", line \d+ in broken\n', stacks.read_text())


def test_again_and_again(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Rank 1 alone loses workers; after three new ones the run stops, and rank 0 reports what rank 1 has found."""
    marks = tmp_path / "marks"
    marks.mkdir()
    fault = {"how": "killed", "at": 3, "times": 100, "marks": str(marks), "rank": 1}
    done = ended(recipe(), tmp_path / "run", ranks=2, fault=broken_workers, code=2, **fault)
    assert done.output.count("new ones start at this step") == 3 and len(list(marks.iterdir())) == 4
    assert done.output.count("error: ") == 1 and "Traceback" not in done.output
    assert re.search(
        r"error: dataloader worker 1 of 1 .* for the 4th time within 100 steps\. .* \(on rank 1, in step", done.output
    )


def test_storage_that_fails_now_and_then(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Every third read fails once and all are slow; samples and losses stay the same, and nothing is skipped."""
    path = recipe()
    whole = ended(path, tmp_path / "whole", fault=watched)
    fault = {"share": 3, "number": errno.EIO, "seconds": 0.02}
    faulty = ended(path, tmp_path / "faulty", fault=failing_reads, **fault)
    assert fed(faulty.folder, 1) == fed(whole.folder, 1) and losses(faulty) == losses(whole)
    assert faulty.output.count("Input/output error; next attempt in") > 10
    assert sum(line["data/skipped"] for line in faulty.metrics) == 0


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["skip", "stop"])
def test_storage_that_fails_for_good(share: float, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """When a whole dataset cannot be read, its samples are left out and counted, or the run stops with the reason."""
    path = recipe(data__max_skipped_share=share)
    code = 0 if share else 2
    done = ended(path, tmp_path / "run", fault=failing_reads, share=1, number=errno.ESTALE, dataset="vqa", code=code)
    skipped = re.findall(
        r"skipped \(unreadable\) .*/vqa/.*: reading \.json failed repeatedly: Stale file handle", done.output
    )
    assert skipped and "Traceback" not in done.output
    if share:
        assert sum(line["data/skipped_unreadable"] for line in done.metrics if "train/loss" in line) == len(skipped)
        assert len(done.metrics) == 6
    else:
        assert "unreadable), more than data.max_skipped_share (0.0) allows" in done.output
