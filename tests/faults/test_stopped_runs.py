"""Runs that are killed or stopped resume with the same samples and the same numbers, on as many ranks or fewer."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended, started
from rank_faults import fed, interrupted, steps_fed, watched
from safetensors.torch import load_file

from tinygptv_ds.train.checkpoint.folders import complete_ones
from tinygptv_ds.train.liveness.launchers import LOST

NUMBERS = ("train/loss", "train/grad_norm", "train/lr", "train/skipped_steps")
ZERO_3 = "--set=deepspeed.zero_optimization.stage=3"


@pytest.fixture
def recipe(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe without a panel at the end."""

    def write(**changes: Any) -> Path:
        return tiny.write_recipe(tmp_path / "recipe.yaml", raw_recipe(train__sample_count=0, **changes))

    return write


def numbers(run: Ranks) -> list[list[float]]:
    return [[line["step"], *(line[name] for name in NUMBERS)] for line in run.metrics]


def files(run: Path) -> dict[str, bytes]:
    """Return the last weights, and the files of the last checkpoint that do not depend on how it was reached."""
    newest = complete_ones(run / "checkpoints")[-1]
    paths = (run / "model/trained.safetensors", newest / "state.safetensors", newest / "state.json")
    return {path.name: path.read_bytes() for path in paths}


def test_killed_in_the_middle_of_an_epoch(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """20 steps are 10, SIGKILL to a rank and 10, bit for bit: dropout, two groups of parameters, batches by tokens."""
    path = recipe(
        train__steps_per_epoch=20,
        train__batch_size=16,
        train__micro_batch_size=None,
        train__max_tokens=150,
        train__checkpoint_every=10,
        model__resid_dropout=0.1,
        model__lora_dropout=0.1,
        data__num_workers=1,
    )
    whole = ended(path, tmp_path / "whole", ranks=2, fault=watched)
    fault = {"at": 12, "number": signal.SIGKILL, "rank": 1, "after": "step-00000010"}
    with started(path, tmp_path / "broken", ranks=2, fault=watched, **fault) as killed:
        assert killed.end() == [LOST, -signal.SIGKILL], killed.output
    (lost_in,) = re.findall(r"^error: rank 1 \(.* was lost in step (\d+) \(its process is gone\)", killed.output, re.M)
    assert int(lost_in) in (13, 14) and "step-00000010\n" in killed.output and "Traceback" not in killed.output
    assert not (killed.folder / "model").exists()
    broken = ended(path, tmp_path / "broken", ranks=2, fault=watched)
    assert "resuming from" in broken.output and "step-00000010" in broken.output
    assert numbers(broken) == numbers(whole) and len(numbers(whole)) == 20
    assert files(broken.folder) == files(whole.folder)
    for rank in range(2):
        unbroken = dict(steps_fed(whole.folder, rank))
        again = steps_fed(broken.folder, rank)
        assert list(unbroken) == list(range(20)) and all(samples == unbroken[step] for step, samples in again)
        steps = [step for step, _ in again]
        assert steps in ([*range(13), *range(10, 20)], [*range(14), *range(10, 20)])  # rank 0 may have begun the next
    together = fed(whole.folder, 2)
    refs = [ref for step in range(20) for ref in together[step]]
    assert [ref[0] for ref in refs] == list(range(20 * 16))  # none lost, none repeated, 160 of them after the kill
    for name in ("vqa", "text", "chat", "pair"):  # nor within the epoch that was under way: 12 samples each
        drawn = [tuple(ref[2:]) for ref in refs if ref[1] == name]
        assert len(set(drawn)) == len(drawn) > 6 * 12 and len(drawn) * 10 // 20 % 12 != 0


def test_stopped_by_signals_and_resumed_on_other_ranks(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """4 ranks, SIGUSR1 to the last of them; 2 ranks under ZeRO-3, SIGTERM to one; 3 ranks to the end."""
    path = recipe(train__steps_per_epoch=10, train__batch_size=12, train__micro_batch_size=1)
    whole = ended(path, tmp_path / "whole", fault=watched)
    run = tmp_path / "run"
    first = ended(path, run, ranks=4, fault=watched, at=2, number=signal.SIGUSR1, rank=3, code=138)
    # Sent in the third step: the fourth is the first that all ranks know of it in.
    assert [folder.name for folder in complete_ones(run / "checkpoints")] == ["step-00000004"]
    assert "stopped: SIGUSR1 at step 4 of 10; saved. Start the same command again to resume" in first.output
    assert first.output.count("stopped: ") == 1 and "Traceback" not in first.output
    workers = "--set=data.num_workers=1"
    ended(path, run, ZERO_3, workers, ranks=2, fault=watched, at=6, number=signal.SIGTERM, rank=1, code=143)
    assert complete_ones(run / "checkpoints")[-1].name == "step-00000008"
    last = ended(path, run, ranks=3, fault=watched)
    assert [line["step"] for line in last.metrics] == list(range(1, 11))
    assert fed(run, 4) == fed(tmp_path / "whole", 1)
    assert last.metrics[0]["train/loss"] != last.metrics[-1]["train/loss"]
    for ours, theirs in zip(last.metrics, whole.metrics, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6), ours["step"]


def test_resumed_under_zero_3_where_parameters_do_not_divide(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Of 32 weights three ranks hold eleven each, the last one with a gap; moments come back whole, too."""
    path = recipe(train__steps_per_epoch=5, train__batch_size=12, train__micro_batch_size=1)
    whole = ended(path, tmp_path / "whole", "--set=train.checkpoint_every=2", "--set=train.keep_checkpoints=9")
    run = tmp_path / "run"
    shutil.copytree(whole.folder / "checkpoints/step-00000002", run / "checkpoints/step-00000002")
    divided = "--set=deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    three = ended(path, run, ZERO_3, divided, "--set=train.checkpoint_every=1", ranks=3)
    for ours, theirs in zip(three.metrics, whole.metrics[2:], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6), ours["step"]
    saved = [load_file(each / "checkpoints/step-00000005/state.safetensors") for each in (run, whole.folder)]
    for name, tensor in saved[1].items():
        torch.testing.assert_close(
            saved[0][name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_at_one_rank_that_loads(rank: int, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Before the ranks share signals, the others learn from its last message why it has gone."""
    run = ended(recipe(), tmp_path / "run", ranks=2, fault=partial(interrupted, rank), code=130)
    assert "interrupted by Ctrl-C" in run.output and "Traceback" not in run.output


def test_by_the_clock_of_rank_0(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """An interval of milliseconds means every step, and the other ranks follow."""
    path = recipe(train__steps_per_epoch=3)
    keep = "--set=train.keep_checkpoints=9"
    run = ended(path, tmp_path / "run", "--set=train.checkpoint_minutes=1e-6", keep, ranks=2)
    names = [folder.name for folder in complete_ones(run.folder / "checkpoints")]
    assert names == ["step-00000001", "step-00000002", "step-00000003"]
    run = ended(path, tmp_path / "seldom", "--set=train.checkpoint_minutes=60", keep)
    assert [folder.name for folder in complete_ones(run.folder / "checkpoints")] == ["step-00000003"]  # the end


def test_two_jobs_in_one_run_directory(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The second job is refused with a message that names the first; a lock does not outlive a SIGKILL."""
    path, run = recipe(train__checkpoint_every=2), tmp_path / "run"
    waiting = {"at": 3, "after": "step-00000002", "pause": "never"}
    with started(path, run, ranks=2, fault=watched, **waiting) as first:
        first.wait_for(run / "reached")
        second = ended(path, run, ranks=2, code=2)
        held = json.loads((run / "lock.json").read_text())
        assert held["pid"] == first.processes[0].pid
        assert second.output.count("error: ") == 1 and "Traceback" not in second.output
        assert f"{run} is in use by another job (process {held['pid']} on {held['host']} since" in second.output
        for process in first.processes:
            process.kill()
    third = ended(path, run, ranks=2)
    assert "resuming from" in third.output and third.metrics[-1]["step"] == 6


def test_of_another_recipe(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """All ranks end alike and name the fields; --resume-anyway continues and logs the same."""
    path, run = recipe(train__checkpoint_every=3), tmp_path / "run"
    ended(path, run)
    shutil.rmtree(run / "model")
    before = (run / "recipe.yaml").read_text()
    other = ["--set=optimizer.lr=0.002", "--set=train.epochs=2", "--set=train.log_every=2"]
    refused = ended(path, run, *other, ranks=2, code=2)
    differing = "  - optimizer.lr: 0.003 in the checkpoint, 0.002 here\n  - train.epochs: 1 in the checkpoint, 2 here\n"
    assert differing in refused.output and "log_every" not in refused.output
    assert refused.output.count("error: ") == 1 and "Traceback" not in refused.output
    assert (run / "recipe.yaml").read_text() == before
    meant = ended(path, run, *other, "--resume-anyway")
    assert differing in meant.output and meant.metrics[-1]["step"] == 12


@pytest.mark.parametrize("stages", [(2, 3), (3, 2)], ids=["ZeRO-2 to 3", "ZeRO-3 to 2"])
def test_deepspeed_checkpoints(stages: tuple[int, int], recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Two ranks write them next to ours, and another run resumes from them with moments and step counters."""
    path = recipe(train__steps_per_epoch=4, train__checkpoint_every=2, model__resid_dropout=0.1)
    here, there = ([f"--set=deepspeed.zero_optimization.stage={stage}"] for stage in stages)
    whole = ended(path, tmp_path / "whole", *here, "--set=train.deepspeed_checkpoints=true", ranks=2)
    ours, theirs = whole.folder / "checkpoints/step-00000002", whole.folder / "deepspeed/step-00000002"
    done = {}
    for name, given in (("ours", ours), ("theirs", theirs)):
        done[name] = ended(path, tmp_path / name, *there, "--resume", str(given), ranks=2)
        assert [line["step"] for line in done[name].metrics] == [3, 4]
    assert numbers(done["theirs"]) == numbers(done["ours"])
    assert files(done["theirs"].folder)["state.safetensors"] == files(done["ours"].folder)["state.safetensors"]
    for mine, other in zip(done["theirs"].metrics, whole.metrics[2:], strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
