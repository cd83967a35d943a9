"""A rank that dies, freezes or hangs in a step: the others end in time, say which it is, and leave nothing behind."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import started
from rank_hangs import in_step

LOST = 75


@pytest.fixture
def recipe(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of four micro-batches a step on one rank, without a panel."""

    def write(**changes: Any) -> Path:
        small = {"train__batch_size": 12, "train__micro_batch_size": 1, "train__sample_count": 0}
        return tiny.write_recipe(tmp_path / "recipe.yaml", raw_recipe(**small, **changes))

    return write


def test_killed_in_a_step(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """One of four; the system tells of it at once."""
    path = recipe(train__checkpoint_every=2, data__num_workers=1)
    with started(path, tmp_path / "run", ranks=4, fault=in_step, at=3, rank=2, how="killed") as run:
        run.wait_for(run.folder / "reached")
        began = time.monotonic()
        codes = run.end()
        print(time.monotonic() - began, run.output)
    assert codes == [LOST, LOST, -signal.SIGKILL, LOST]
    assert run.output.count("error: ") == 1 and "Traceback" not in run.output


def test_rank_0_is_killed(recipe: Callable[..., Path], tmp_path: Path) -> None:
    with started(recipe(), tmp_path / "run", ranks=3, fault=in_step, at=2, rank=0, how="killed") as run:
        assert run.end() == [-signal.SIGKILL, LOST, LOST]
        print(run.output)
    assert "error: rank 0 (" in run.output and run.output.count("error: ") == 1 and "Traceback" not in run.output


def test_a_rank_fails(recipe: Callable[..., Path], tmp_path: Path) -> None:
    with started(recipe(), tmp_path / "run", ranks=3, fault=in_step, at=2, rank=1, how="failing") as run:
        codes = run.end()
        print(codes, run.output)


@pytest.mark.parametrize("how", ["frozen", "holding Python's lock"])
def test_no_sign_of_life(how: str, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(train__lost_after_seconds=3)
    with started(path, tmp_path / "run", ranks=2, fault=in_step, at=2, rank=1, how=how) as run:
        run.processes[0].join(60)
        print(run.output)
        run.processes[1].join(1)
        print([p.exitcode for p in run.processes])


def test_hang(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(train__slow_step_seconds=1, train__step_minutes=0.1, data__num_workers=1)
    with started(path, tmp_path / "run", ranks=3, fault=in_step, at=2, rank=1, how="asleep") as run:
        codes = run.end()
        print(codes, run.output)
