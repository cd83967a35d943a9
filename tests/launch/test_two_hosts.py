"""A run over two hosts: trained, stopped and gone on with as in one process; and ended, with a message, if one dies."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import started
from helpers.launcher import CPU, ROOT
from helpers.patience import PATIENCE
from helpers.two_hosts import TwoHosts, finish, two_hosts, why_not

_MISSING = why_not()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"no two hosts here: {_MISSING}")

STAGE = str(ROOT / "launch/stage4.sh")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path / "hosts") as made:
        yield made


@pytest.fixture
def recipe(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        return tiny.write_recipe(tmp_path / "recipe.yaml", raw_recipe(train__sample_count=0, **changes))

    return write


def command(two: TwoHosts, recipe: Path, run: Path, *launcher: str) -> list[str]:
    """A launch over both hosts."""
    given = ["--recipe", str(recipe), "--run-dir", str(run), "--deepspeed_config", str(CPU)]
    return [*launcher, "--hostfile", str(two.hostfile), STAGE, *given]


def wait_for_line(run: Path, number: int, process: subprocess.Popen[str]) -> None:
    metrics, until = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        assert process.poll() is None and time.monotonic() < until, finish(process, 1)[1]
        time.sleep(0.02)


def nothing_is_left(two: TwoHosts) -> None:
    assert {host.name: host.strays() for host in two.hosts} == {"node1": [], "node2": []}


def test_stopped_resumed_and_a_host_dies(two: TwoHosts, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Both hosts are fit; stopped and started again, the losses are one process's; then a host dies, and is named.

    SIGUSR1 to the script that was started reaches the ranks of both hosts.
    """
    path, run = recipe(train__steps_per_epoch=100_000), tmp_path / "run"
    doctor = ["python", "-m", "tinygptv_ds", "doctor", "--hostfile", str(two.hostfile), "--recipe", str(path)]
    code, report = two.run(doctor)
    assert code == 0, report
    assert "MISSING" not in report and report.endswith("Training is possible on node1, node2.\n")
    assert "eth0, as GLOO_SOCKET_IFNAME=eth0 requires" in report
    assert re.search(r"ok +recipe +node1, node2: dataset vqa: 3 shard\(s\), [\d,]+ bytes, 12 samples", report), report
    assert re.findall(r"all-reduce +(\d+) MB \| +[\d.]+ ms", report) == ["1", "4", "16", "64", "181", "256"]

    given = command(two, path, run)
    process = two.start(["bash", STAGE, *given[: given.index(STAGE)], *given[given.index(STAGE) + 1 :]])
    wait_for_line(run, 3, process)
    os.kill(process.pid, signal.SIGUSR1)
    code, output = finish(process)
    assert code == 138, output
    (stopped,) = map(int, re.findall(r"node1: stopped: SIGUSR1 at step (\d+) of 100000; saved", output))
    assert stopped >= 3
    nothing_is_left(two)

    process = two.start(command(two, path, run, "deepspeed"))
    wait_for_line(run, stopped + 3, process)
    two.hosts[1].crash()
    killed = time.monotonic()
    code, output = finish(process, 60)
    assert code != 0 and time.monotonic() - killed < 30, output  # a bound for a hang, not a measurement
    assert f"resuming from {run}/checkpoints/step-{stopped:08d}" in output
    assert "stage 4 on 2 rank(s) of cpu" in output
    lost = re.findall(r"^node1: error: rank 1 \(host node2, process \d+\) was lost in step (\d+) \(", output, re.M)
    assert len(lost) == 1 and int(lost[0]) >= stopped + 3, output
    nothing_is_left(two)

    code, report = two.run(doctor)
    assert code == 2, report
    assert re.search(r"MISSING +ssh +node2: .*Connection refused\n +-> is sshd running there", report), report
    assert "not possible on node1, node2 yet: see ssh above" in report and "Traceback" not in report

    losses = tiny.losses(run)
    with started(path, tmp_path / "one", f"--set=train.checkpoint_every={len(losses)}") as one:
        one.wait_for(one.folder / f"checkpoints/step-{len(losses):08d}")
    assert losses == pytest.approx(tiny.losses(one.folder)[: len(losses)], rel=1e-5, abs=0)


def test_a_cable_is_pulled(two: TwoHosts, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing tells of it but silence: both sides end when they have heard nothing for as long as is allowed."""
    path, run = recipe(train__steps_per_epoch=100_000, train__lost_after_seconds=3), tmp_path / "run"
    process = two.start(command(two, path, run, "deepspeed"))
    wait_for_line(run, 3, process)
    two.hosts[1].cut_off()
    code, output = finish(process, 60)
    assert code != 0
    lost = re.findall(
        r"node1: error: rank 1 \(host node2, process \d+\) was lost in step \d+ \(no sign of life", output
    )
    assert len(lost) == 1, output
    nothing_is_left(two)
