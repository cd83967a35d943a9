"""A loss that is not finite on one rank alone: no rank moves a weight, all stop alike and name the samples."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.data.stream.plan import Planner, open_stream

CASES = [f"ZeRO-{zero} {precision}" for zero in (1, 2, 3) for precision in ("fp32", "bf16")]


class Done(NamedTuple):
    """The run that all these tests examine."""

    run: Ranks
    report: Path
    recipe: Path


@pytest.fixture(scope="module")
def done(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("bad_steps")
    recipe = tiny.write_recipe(folder / "recipe.yaml", tiny.recipe(weights, shards, train__checkpoint_every=1))
    zero_3 = "--set=deepspeed.zero_optimization.stage=3"
    script = "tests/faults/harm_bad_steps.py"
    run = ended(recipe, folder / "run", zero_3, script=script, ranks=2, code=2)  # the exit code of both
    return Done(run, folder, recipe)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_moves_nothing(case: str, done: Done) -> None:
    """Weights and both moments stay bit for bit, also where the loss is infinite and its gradient is not."""
    by_rank = [json.loads((done.report / f"cases-{rank}.json").read_text())[case] for rank in range(2)]
    assert by_rank[0]["kept"] and by_rank[0]["finite"]  # rank 0 has all of them
    assert by_rank[0]["moved"]  # the step after it does, so the one before was left out and the engine is whole
    for found in by_rank:
        assert "the loss is not finite at step 2, for these samples:" in found["said"]
        assert "(rank 1)" in found["said"] and "(rank 0)" not in found["said"]


def test_all_ranks_leave_alike(done: Done) -> None:
    assert "Traceback" not in done.run.output
    (error,) = [line for line in done.run.output.splitlines() if line.startswith("error: ")]
    assert error == "error: the loss is not finite at step 3, for these samples:"
    assert f"all samples of the step are in {done.run.folder / 'bad_step-3.json'}" in done.run.output
    assert [line["step"] for line in done.run.metrics] == [1, 2]
    assert not (done.run.folder / "model").exists()


def test_the_run_keeps_the_weights_from_before(done: Done) -> None:
    good, bad = (torch.load(done.report / f"weights-0-{step}.pt", weights_only=True) for step in (1, 2))
    assert good.keys() == bad.keys() and all(torch.equal(good[name], bad[name]) for name in good)
    newest = max((done.run.folder / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000002"


def test_the_samples_of_every_rank_are_written(done: Done) -> None:
    written = json.loads((done.run.folder / "bad_step-3.json").read_text())
    assert written["step"] == 3
    plan = Planner(open_stream(load_recipe(done.recipe)), 2).plan(2)
    for rank, of_rank in enumerate(written["ranks"]):
        assert of_rank["rank"] == rank
        places = [(s["dataset"], Path(s["shard"]).name, s["index"], s["position"]) for s in of_rank["samples"]]
        planned = plan.rank_share(rank)
        assert places == [(r.dataset, f"{r.shard:05d}.tar", r.index, r.position) for r in planned]
        assert all((s["loss"] == "nan") == (rank == 1) for s in of_rank["samples"])
        assert all(s["key"].isdigit() and s["key"] in done.run.output for s in of_rank["samples"] if rank == 1)
