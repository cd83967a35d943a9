"""The soak test finds nothing in a short run, and would find what it looks for."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.soak import judge
from benchmarks.soaking import plan
from benchmarks.soaking.attempt import Outcome
from benchmarks.soaking.compare import Reference, compare, leftovers, read_fed, unsound
from benchmarks.soaking.damage import DAMAGES, damage
from benchmarks.soaking.inside import POINTS
from benchmarks.soaking.plan import Injection, draw
from benchmarks.soaking.report import Result, Soaked
from tinygptv_ds.train.checkpoint.storage import Snapshot, write_checkpoint

ROOT = Path(__file__).parents[2]
STEPS, RANKS = 4, 2


def test_three_injections(tmp_path: Path) -> None:
    """With forked ranks; nothing is lost, and the figures are written."""
    command = [sys.executable, "benchmarks/soak.py", "--seed", "3", "--minutes", "9", "--launched", "0"]
    command += ["--injections", "3", "--work", str(tmp_path / "soak")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "soak/summary.json").read_text())
    assert figures["injections"] >= 3 and figures["problems"] == 0
    assert figures["totals"]["lost"] == figures["totals"]["wrong"] == 0
    assert figures["totals"]["samples"] == 24 * 12 * len(figures["runs"]) > 0
    assert f"{figures['injections']} injections" in (tmp_path / "soak/summary.md").read_text()


# ---- what it looks for


def write_run(folder: Path) -> tuple[Path, Path]:
    """A finished run of `STEPS` steps on `RANKS` ranks, and its records."""
    run_dir, records = folder / "run", folder / "records"
    for made in (run_dir / "model", records):
        made.mkdir(parents=True)
    lines = [{"step": step + 1, "train/loss": 5.0 - step / 10} for step in range(STEPS)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"w": torch.arange(4.0)}, run_dir / "model/trained.safetensors")
    for rank in range(RANKS):
        fed = [{"step": step, "world": RANKS, "ids": [[[2 * step + rank, "vqa", 0, 0, step]]]} for step in range(STEPS)]
        (records / f"fed-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in fed))
    return run_dir, records


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    return Reference.of(*write_run(tmp_path / "reference"))


def append_fed(records: Path, rank: int, step: int, ids: list, world: int = RANKS) -> None:
    with (records / f"fed-{rank}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "world": world, "ids": [ids]}) + "\n")


def test_equal_runs(reference: Reference, tmp_path: Path) -> None:
    found = compare(reference, *write_run(tmp_path / "ours"), exact=True, was_full=False)
    assert found.problems == [] and found.bit_equal
    assert (found.samples, found.lost, found.wrong, found.loss, found.weight) == (8, 0, 0, 0.0, 0.0)


def test_the_attempt_that_fed_a_step_last_counts(reference: Reference, tmp_path: Path) -> None:
    """On one rank after two, whose second one has a record that no longer counts."""
    run_dir, records = write_run(tmp_path / "ours")
    append_fed(records, 0, 3, [[7, "vqa", 0, 0, 3], [6, "vqa", 0, 0, 3]], world=1)
    assert read_fed(records)[3] == ([[6, "vqa", 0, 0, 3], [7, "vqa", 0, 0, 3]], 1)
    assert compare(reference, run_dir, records, exact=False, was_full=False).problems == []


@pytest.mark.parametrize(
    ("ids", "world", "lost", "wrong"),
    [
        ([[6, "vqa", 0, 0, 3]], 1, 1, 0),  # one of the step's two samples
        ([[6, "vqa", 0, 0, 3], [7, "vqa", 0, 0, 3], [7, "vqa", 0, 0, 3]], 1, 1, 0),  # one of them twice
        ([[8, "vqa", 0, 0, 4], [7, "vqa", 0, 0, 3]], 1, 1, 1),  # one of another step
    ],
)
def test_samples_that_differ(
    ids: list, world: int, lost: int, wrong: int, reference: Reference, tmp_path: Path
) -> None:
    run_dir, records = write_run(tmp_path / "ours")
    append_fed(records, 0, 3, ids, world)
    found = compare(reference, run_dir, records, exact=False, was_full=False)
    assert (found.lost, found.wrong) == (lost, wrong) and found.problems


def test_losses_weights_and_leftovers_that_differ(reference: Reference, tmp_path: Path) -> None:
    run_dir, records = write_run(tmp_path / "ours")
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0].replace("5.0", "5.001") + lines[1] + lines[1] + lines[3] + '{"step')
    save_file({"w": torch.arange(4.0) + 1e-3}, run_dir / "model/trained.safetensors")
    (run_dir / "model.partial").mkdir()
    (run_dir / ".recipe.yaml.x1").touch()
    found = " ".join(compare(reference, run_dir, records, exact=True, was_full=False).problems)
    for expected in ("step 2 is there twice", "lacks steps [3]", "torn", "a loss differs by 2.0e-04"):
        assert expected in found
    assert "4 weight(s) differ, by up to 1.0e-03, where each bit must be equal" in found
    assert "left over: .recipe.yaml.x1, model.partial" in found
    full = " ".join(compare(reference, run_dir, records, exact=False, was_full=True).problems)
    assert "lacks" not in full and "torn" not in full and "twice" in full


def saved(folder: Path, steps: range) -> Path:
    state = {"optimizer_steps": 1, "loss_scale": None, "must_match": None}
    for step in steps:
        write_checkpoint(folder / "checkpoints", Snapshot({"weight/w": torch.ones(100)}, {"step": step, **state}))
    for name in ("metrics.jsonl", "lock.json"):
        (folder / name).write_text('{"step": 1}\n')
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed/latest").write_text("step-00000002")
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_done_and_seen(name: str, tmp_path: Path) -> None:
    run_dir = saved(tmp_path, range(1, 3))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert unsound(run_dir) == set()
    assert damage(run_dir, name)
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert after != before
    assert bool(unsound(run_dir)) == ("newest checkpoint" in name)
    assert bool(leftovers(run_dir)) == ("stale" in name)
    assert not damage(tmp_path / "empty", name)


def test_a_torn_model_is_seen(tmp_path: Path) -> None:
    run_dir, _ = write_run(tmp_path)
    assert len(unsound(run_dir)) == 1  # no provenance.json
    (run_dir / "model/provenance.json").write_text(json.dumps({"sha256": {"trained.safetensors": "0" * 64}}))
    assert unsound(run_dir) == {f"{run_dir / 'model/trained.safetensors'} is torn"}


KILLED = Injection(form=plan.TRAIN, act=plan.KILL, victim=plan.NODE, point="step")


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Outcome(struck=1.0, codes=[75]), ""),
        (Outcome(struck=1.0, codes=[1]), "exit code(s) [1], documented are [75]"),
        (Outcome(struck=1.0, codes=[0]), "exit code(s) [0], documented are [75]"),
        (Outcome(codes=[0]), "exit code 0, and there is no model/"),
        (Outcome(codes=[75]), "exit code(s) [75], documented are [0]"),
        (Outcome(struck=1.0, codes=[75], left={7: "python"}), "processes were left: {7: 'python'}"),
        (Outcome(struck=1.0, codes=[75], output="Traceback (most"), "its output holds a traceback"),
        (Outcome(struck=1.0, hung=True), "it did not end, and was killed"),
    ],
)
def test_judgement(outcome: Outcome, problem: str, tmp_path: Path) -> None:
    assert judge(KILLED, outcome, tmp_path) == ([problem] if problem else [])


def test_injections_are_drawn_from_the_seed() -> None:
    def drawn(seed: int, **changes: object) -> list[Injection]:
        rng = random.Random(seed)
        return [draw(rng, **{"exact": False, "launched": 0.5, **changes}) for _ in range(600)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert {each.point for each in drawn(1)} == set(POINTS)
    assert {each.form for each in drawn(1)} == {plan.FORKED, plan.TRAIN, plan.RESTARTED, plan.DEEPSPEED}
    assert {each.damage for each in drawn(1)} == {"", *DAMAGES}
    assert {(each.setup.ranks, each.setup.zero) for each in drawn(1)} == {(r, z) for r in (1, 2, 3) for z in (1, 2, 3)}
    assert {(each.setup.ranks, each.setup.zero) for each in drawn(1, exact=True)} == {(2, 2)}
    documented = {0, 2, 75, 130, 138, 143}
    for each in drawn(3):
        assert each.rank < each.setup.ranks and (each.act or not each.victim)
        if each.form == plan.TRAIN and each.victim != plan.FRONT:
            assert each.codes() <= documented


def test_the_summary() -> None:
    done = Soaked(
        [Result(0, 0, KILLED, True, False, [75], 2.4, 9.6), Result(0, 1, Injection(), False, False, [0], 5.0)]
    )
    done.attempts.append(Result(1, 0, replace(KILLED, damage="a torn latest"), True, True, [75], 3.0, None, ["lost"]))
    head, _, *rows = done.table()
    assert head.startswith("| injected | times |")
    assert "| SIGKILL of a per-node launcher | 2 | 2 | 75 (2) | 3 s | 10 s | 1 |" in rows
    assert "| a torn latest | 1 | 1 | 75 (1) | 3 s | - | 1 |" in rows
    assert done.injections == 3 and done.problems == 1
