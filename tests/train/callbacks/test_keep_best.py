"""The best weights of a run: which are kept, when a run ends early, and that both survive being killed."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import forked
from safetensors.torch import load_file

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.callbacks import keep_best
from tinygptv_ds.train.callbacks.keep_best import KeepBest
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.weights.assemble import build_model

RAW = Callable[..., dict[str, Any]]
VALIDATED = {"data__validation_share": 0.25, "train__validate_every": 2, "train__keep_best": "val/loss"}


@pytest.fixture(scope="module")
def model(weights: Path, shards: dict[str, Path]) -> TinyGPTVForConditionalGeneration:
    from helpers import tiny

    recipe = build_recipe(tiny.recipe(weights, shards), "test")
    return build_model(recipe.model, recipe.text, frozen_dtype=torch.float32)


@pytest.fixture
def begin(raw_recipe: RAW, tmp_path: Path, model: TinyGPTVForConditionalGeneration) -> Callable[..., Run]:
    """Return a function that makes a run whose weights are all equal to the step that `at` is given."""

    def make(first_step: int = 0, **changes: Any) -> Run:
        recipe = build_recipe(raw_recipe(**{**VALIDATED, "train__steps_per_epoch": 100, **changes}), "test")
        engine = SimpleNamespace(module=model)
        job = Job(recipe, {}, tmp_path / "run", "auto", Ranks(0, 0, 1, 1))
        return Run(job, engine, None, first_step)

    return make


def at(run: Run, step: int) -> Run:
    run.engine.trained_state = lambda: {"llama_proj.bias": torch.full((3,), float(step))}
    return run


def kept(run: Run) -> tuple[int, float]:
    """Return the step that `best/` is noted to be of, and that of its weights."""
    folder = run.job.run_dir / "best"
    notes = json.loads((folder / "provenance.json").read_text())
    assert notes["step"] == notes["best"]["step"]
    return notes["step"], load_file(folder / "trained.safetensors")["llama_proj.bias"].mean().item()


def feed(run: Run, best: KeepBest, values: dict[int, float], name: str = "val/loss") -> None:
    for step, value in values.items():
        at(run, step)
        best.on_measure(step, {"val/other": -9.0, name: value})


def test_the_lowest_loss_is_kept(begin: Callable[..., Run]) -> None:
    run = begin()
    best = KeepBest(run)
    feed(run, best, {2: 3.0, 4: float("nan"), 6: 2.0, 8: 2.0, 10: 2.5})
    assert kept(run) == (6, 6.0) and run.last_step == 100


def test_the_highest_score_is_kept(begin: Callable[..., Run]) -> None:
    scored = {"benchmarks": [{"kind": "vqa", "shards": "x", "name": "mine"}], "every": 2}
    run = begin(evaluation=scored, train__keep_best="eval/mine/strict")
    feed(run, KeepBest(run), {2: 10.0, 4: 30.0, 6: 20.0}, "eval/mine/strict")
    assert kept(run) == (4, 4.0)


def test_patience_ends_the_run(begin: Callable[..., Run]) -> None:
    run = begin(train__patience=2)
    best = KeepBest(run)
    feed(run, best, {2: 3.0, 4: 2.0, 6: 2.0})
    assert run.last_step == 100
    feed(run, best, {8: 2.1})
    assert run.last_step == 8 and kept(run) == (4, 4.0)


@pytest.mark.parametrize("resumed_at", [5, 7])
def test_a_resumed_run_knows_its_best(begin: Callable[..., Run], resumed_at: int) -> None:
    """The count of measurements since the best one goes on; those that are repeated do not count twice."""
    run = begin()
    feed(run, KeepBest(run), {2: 3.0, 4: 2.0, 6: 2.5})
    run = begin(resumed_at, train__patience=2)
    best = KeepBest(run)
    feed(run, best, {6: 2.5} if resumed_at == 5 else {})
    assert run.last_step == 100
    feed(run, best, {8: 2.2})
    assert run.last_step == 8 and kept(run) == (4, 4.0)
    run = begin(8, train__patience=2)
    KeepBest(run)
    assert run.last_step == 8  # killed between its last checkpoint and model/, it takes no further step


def test_a_kill_while_the_best_is_replaced_loses_nothing(begin: Callable[..., Run]) -> None:
    run = begin()
    feed(run, KeepBest(run), {2: 3.0})
    folder = run.job.run_dir / "best"
    folder.rename(folder.with_name("best.old"))
    run = begin(2)
    feed(run, KeepBest(run), {4: 3.5})
    assert kept(run) == (2, 2.0)


def test_values_on_other_samples_are_not_compared(begin: Callable[..., Run]) -> None:
    run = begin()
    feed(run, KeepBest(run), {2: 3.0})
    run = begin(2, train__validation_samples=7)
    feed(run, KeepBest(run), {4: 3.5})
    assert kept(run) == (4, 4.0)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"best": 1}', b"\0\0"])
def test_a_damaged_note_is_survived(begin: Callable[..., Run], content: bytes) -> None:
    run = begin()
    feed(run, KeepBest(run), {2: 3.0})
    (run.job.run_dir / "best/provenance.json").write_bytes(content)
    run = begin(2)
    feed(run, KeepBest(run), {4: 3.5})
    assert kept(run) == (4, 4.0)


def test_a_run_that_starts_over_forgets_an_earlier_one(begin: Callable[..., Run]) -> None:
    run = begin()
    feed(run, KeepBest(run), {2: 3.0})
    run = begin()
    feed(run, KeepBest(run), {2: 4.0})
    assert (
        kept(run) == (2, 2.0)
        and json.loads((run.job.run_dir / "best/provenance.json").read_text())["best"]["value"] == 4.0
    )


def test_a_full_disk_keeps_the_earlier_best(begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin()
    best = KeepBest(run)
    feed(run, best, {2: 3.0})
    write = keep_best.write_best

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keep_best, "write_best", full)
    feed(run, best, {4: 2.0})
    assert kept(run) == (2, 2.0)
    monkeypatch.setattr(keep_best, "write_best", write)
    feed(run, best, {6: 2.5})  # better than the one that is kept
    assert kept(run) == (6, 6.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__result": "best"}, r"train\.result is best, but train\.keep_best names no metric"),
        ({"train__patience": 1}, r"train\.patience is set, but train\.keep_best names no metric"),
        ({"train__result": "first"}, r"train\.result must be last or best"),
        ({"train__keep_best": "val/loss"}, r"val/loss': say how often with train\.validate_every"),
        ({"train__keep_best": "loss"}, r"which is not measured; choose one of val/loss$"),
        (
            {"train__keep_best": "eval/vq/strict", "evaluation": {"benchmarks": [{"kind": "vqa", "shards": "x"}]}},
            r"choose one of val/loss, eval/vqa/SCORE",
        ),
        (
            {"train__keep_best": "eval/vqa/strict", "evaluation": {"benchmarks": [{"kind": "vqa", "shards": "x"}]}},
            r"say how often with evaluation\.every",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, raw_recipe: RAW) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe(raw_recipe(**changes), "test")


def _killed_after_writing(step: int) -> None:
    """Make the rank die at once when it has written the best weights of a step."""
    write = keep_best.write_best

    def write_and_die(run: Run, state: object, best: Any) -> None:
        write(run, state, best)
        if best.step == step:
            os._exit(9)

    keep_best.write_best = write_and_die


def test_a_run_that_is_killed_ends_as_one_that_is_not(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """It is killed after a better measurement than that of its last checkpoint, and ends early with the best."""
    changes = {**VALIDATED, "train__patience": 1, "train__result": "best", "train__checkpoint_every": 3}
    # A learning rate that rises until the weights get worse.
    rising = {"optimizer__schedule": "cosine", "optimizer__min_lr": 3.0, "train__steps_per_epoch": 14}
    changes |= rising | {"train__sample_count": 0}
    recipe = recipe_file(**changes)
    whole = forked.ended(recipe, tmp_path / "whole")
    losses = {line["step"]: line["val/loss"] for line in whole.metrics if "val/loss" in line}
    assert "the learning rate rises from 0.003 towards 3: " in whole.output.partition("stage 4: ")[0]  # before any step
    best = min(losses, key=losses.__getitem__)
    last = max(losses)
    assert last == best + 2 < 14 and best > 3, losses
    assert f"step {last}: ending early, val/loss has not been better" in whole.output
    assert re.search(
        rf"(?m)^finished: {last} steps, 0:0\d:\d\d; train/loss [\d.]+, val/loss [\d.]+\n"
        rf"model: {whole.folder}/model \(those of step {best}, with the best val/loss: {losses[best]:.4f}\)\n"
        rf"next:\n  tinygptv-ds chat {whole.folder}\n",
        whole.output,
    )
    notes = json.loads((whole.folder / "model/provenance.json").read_text())
    assert notes["step"] == best and notes["best"]["value"] == losses[best]
    assert [path.name for path in sorted((whole.folder / "checkpoints").iterdir())][-1] == f"step-{last:08d}"

    broken = tmp_path / "broken"
    forked.ended(recipe, broken, code=9, fault=_killed_after_writing, step=best)
    assert not (broken / "model").exists()
    again = forked.ended(recipe, broken)
    assert "resuming from" in again.output or best < 3
    for name in ("trained.safetensors", "config.json"):
        assert (broken / "model" / name).read_bytes() == (whole.folder / "model" / name).read_bytes()
    shutil.rmtree(broken)
