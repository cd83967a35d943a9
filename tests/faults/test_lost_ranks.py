"""A rank that dies, freezes or hangs in a step: the others end in time, say which it is, and leave nothing behind."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import Ranks, started
from helpers.patience import PATIENCE
from rank_faults import killed_before_its_first_word
from rank_hangs import hanging, in_step, starting_up

from tinygptv_ds.doctor.run_report import run_report
from tinygptv_ds.plain_pickle import load_plain

LOST = 75


@pytest.fixture
def recipe(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe of twelve micro-batches a step for all ranks, without a panel."""

    def write(**changes: Any) -> Path:
        small = {"train__batch_size": 12, "train__micro_batch_size": 1, "train__sample_count": 0}
        return tiny.write_recipe(tmp_path / "recipe.yaml", raw_recipe(**small, **changes))

    return write


def error_of(run: Ranks) -> str:
    """Return the one message with which the run ended."""
    assert "Traceback" not in run.output, run.output
    (error,) = re.findall(r"^error: (.*)$", run.output, flags=re.M)
    return error


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    until = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_before_the_watchdog_of_that_rank_begins(rank: int, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Its connection, which is there by then, says who it was; the other one does not wait for anything more."""
    with started(recipe(), tmp_path / "run", ranks=2, fault=killed_before_its_first_word, rank=rank) as run:
        codes = run.end()
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == LOST
    assert re.match(rf"rank {rank} .* was lost while the run was starting up \(its process is gone\)", error_of(run))


def test_one_of_four_is_killed(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The system reports a death in the middle of a step at once, and no dataloader worker is left, either."""
    path = recipe(train__checkpoint_every=2, data__num_workers=1)
    with started(path, tmp_path / "run", ranks=4, fault=in_step, at=3, rank=2, how="killed", after=0.5) as run:
        run.wait_for(run.folder / "metrics.jsonl")
        workers = [child for process in run.processes for child in children(process.pid)]
        assert len(workers) >= 4
        run.tell(0, signal.SIGUSR2)  # a request from outside is answered, too
        run.wait_for(run.folder / "reached")
        began = time.monotonic()
        assert run.end() == [LOST, LOST, -signal.SIGKILL, LOST]
        assert time.monotonic() - began < 30  # a bound for a hang, not a measurement
        assert gone(workers)
    host, pid = os.uname().nodename, run.processes[2].pid
    newest = run.folder / "checkpoints/step-00000002"
    assert error_of(run).startswith(f"rank 2 (host {host}, process {pid}) was lost in step 4 (its process is gone). ")
    assert error_of(run).endswith(f"start the same command again: it resumes from {newest}")
    assert error_of(run) in (run.folder / "log.txt").read_text()
    assert re.search(r'stage4.py", line \d+ in main', (run.folder / "stacks/rank-0.txt").read_text())


def test_rank_0_is_killed(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The others are connected to rank 0; rank 1 reports in its place."""
    with started(recipe(), tmp_path / "run", ranks=3, fault=in_step, at=2, rank=0, how="killed") as run:
        assert run.end() == [-signal.SIGKILL, LOST, LOST]
    assert error_of(run).startswith("rank 0 (host ") and "was lost in step 3 (its process is gone)" in error_of(run)


def test_the_launcher_ends_the_others_at_once(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The launcher's SIGTERM may arrive before the lost rank is reported, but does not prevent the report."""
    with started(recipe(), tmp_path / "run", ranks=2, fault=in_step, at=2, rank=1, how="killed") as run:
        run.wait_for(run.folder / "reached")
        while run.processes[0].is_alive():
            run.tell(0, signal.SIGTERM)
            time.sleep(0.005)
        assert run.end() == [LOST, -signal.SIGKILL]
    assert error_of(run).startswith("rank 1 (host ") and "was lost in step 3 (its process is gone)" in error_of(run)


def test_a_rank_with_a_bug(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Its traceback stays, and it ends though Python cannot; the others add no tracebacks of their collectives."""
    with started(recipe(), tmp_path / "run", ranks=3, fault=in_step, at=2, rank=1, how="failing") as run:
        assert run.end() == [1, 1, 1]
    assert run.output.count("Traceback") == 1 and run.output.count("IndexError: pop from empty list\n") == 1
    assert "error: IndexError: pop from empty list (on rank 1, in step 3; its traceback is above)\n" in run.output


@pytest.mark.parametrize("how", ["frozen", "holding Python's lock"])
def test_no_sign_of_life(how: str, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Its process is there, but its watchdog does not run."""
    path = recipe(train__lost_after_seconds=2)
    with started(path, tmp_path / "run", ranks=2, fault=in_step, at=2, rank=1, how=how, after=0.5) as run:
        run.wait_for(run.folder / "reached")
        run.processes[0].join(30)
        assert run.processes[0].exitcode == LOST, run.output
        found = r"rank 1 .* was lost in step 3 \((no sign of life for 2 s: host or network down|its process is gone)"
        assert re.match(found, error_of(run))
        if how == "frozen":
            run.tell(1, signal.SIGCONT)
        # By itself; of its stacks Python may crash, since a thread that goes on changes them while they are written.
        assert run.end()[1] in (1, LOST, -signal.SIGSEGV)
    if how != "frozen":  # what it did is written all the same
        written = (run.folder / "stacks/rank-1.txt").read_text()
        assert written.startswith("Timeout (0:00:02)!") and re.search(r'rank_hangs.py", line \d+ in broken', written)


def test_a_rank_that_hangs(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A long time for the start-up and a short one for a step, for collectives and watchdog; stacks of every rank."""
    limits = {"train__slow_step_seconds": 1, "train__step_minutes": 0.1, "data__read_timeout_seconds": 5}
    path = recipe(**limits, data__num_workers=1)
    with started(path, tmp_path / "run", ranks=3, fault=hanging, at=2, rank=1, margin=-4) as run:
        run.end()
        codes = [process.exitcode for process in run.processes]
    assert codes == [LOST] * 3, run.output
    assert [line["step"] for line in run.metrics] == [1, 2]
    for rank in (0, 2):  # two seconds are not too long for the first step; and what gloo says of them stays unsaid
        assert "Timed out waiting 2000ms" in (run.folder / f"failed-{rank}").read_text()
    host, pid = os.uname().nodename, run.processes[1].pid
    who = f"rank 1 (host {host}, process {pid}) has been in a backward pass or a step of the optimizer, and the others"
    warned = rf"^{re.escape(who)} waiting for it, in step 3 for \d+ s, where a whole step takes \d+\.\d s; the"
    assert len(re.findall(warned, run.output, flags=re.M)) == 1
    found = rf"{re.escape(who)} waiting for it, in step 3 for \d+ s, longer than train.step_minutes \(0\.1\) allows; "
    assert re.match(found, error_of(run)) and "it begins again" in error_of(run)
    for rank, process in enumerate(run.processes):
        written = (run.folder / f"stacks/rank-{rank}.txt").read_text()
        assert len(re.findall(rf"^== \S+ \S+ rank 1 .*; process {process.pid}$", written, flags=re.M)) == 2
        assert len(re.findall(r"^== \S+ \S+ rank 1 .*; dataloader worker \d+, state S", written, flags=re.M)) == 2
        assert bool(re.search(r'rank_hangs.py", line \d+ in <lambda>', written)) == (rank == 1)
        assert load_plain((run.folder / f"stacks/collectives_rank_{rank}").read_bytes())["entries"]
        assert re.search(r'stage4.py", line \d+ in main', written)
    report = "\n".join(run_report(run.folder))
    assert re.search(rf"rank-0.txt: \S+ \S+ {re.escape(who)} waiting .* process {run.processes[0].pid}\n", report)
    assert "The others wait for rank 1, which has not reached the next collective: read its stacks.\n" in report


def test_alone(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """One rank that hangs has nobody else to end it."""
    path = recipe(train__step_minutes=0.04, data__read_timeout_seconds=2)
    with started(path, tmp_path / "run", fault=in_step, at=2, rank=0, how="asleep") as run:
        assert run.end() == [LOST]
    assert re.search(r"optimizer in step 3 for \d+ s, longer than train.step_minutes \(0\.04\)", error_of(run))
    assert "rank_hangs.py" in (run.folder / "stacks/rank-0.txt").read_text()


@pytest.mark.parametrize(("how", "code", "advice"), [("at work", 2, "still at work"), ("asleep", LOST, "only slow")])
def test_a_start_up_over_its_limit(
    how: str, code: int, advice: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A restart may help one that hangs, on storage for example; one that computes would take as long again."""
    path = recipe(train__startup_minutes=0.07)
    with started(path, tmp_path / "run", fault=starting_up, how=how) as run:
        assert run.end() == [code]
    message = error_of(run)
    assert re.search(r"has been starting up for \d+ s, longer than train.startup_minutes \(0\.07\)", message)
    assert advice in message and "raise train.startup_minutes" in message.replace("Raise", "raise")


def test_a_run_that_nothing_happens_to(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """It says nothing of all this, and leaves no empty files; patience is for saves and validation alone."""
    path = recipe(train__checkpoint_every=2, data__validation_share=0.2, train__validate_every=2)
    with started(path, tmp_path / "run", ranks=2) as run:
        assert run.end() == [0, 0]
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert not (run.folder / "stacks").exists()
    assert not re.search(r"error|Traceback|asyncio|watchdog|lost|stacks|rank 1 \(", run.output), run.output
