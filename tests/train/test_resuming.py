"""Checkpoints: a damaged one is named and passed over, another run's is refused, an unfinished one is not seen."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinygptv_ds.config.load import apply_overrides, build_recipe
from tinygptv_ds.dist import Ranks
from tinygptv_ds.errors import CheckpointError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint import _remove_old, _write, fingerprint, latest_checkpoint, load_weights
from tinygptv_ds.train.job import Job
from tinygptv_ds.train.metrics import forget_after

MakeJob = Callable[..., Job]


@pytest.fixture
def job(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> MakeJob:
    """The same run with other values, as `--set` gives them."""

    def make(*overrides: str) -> Job:
        recipe = build_recipe(apply_overrides(raw_recipe(), overrides), "test")
        return Job(recipe, {}, tmp_path / "run", "auto", Ranks(0, 0, 1, 1))

    return make


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    return caplog


def write(job: Job, step: int) -> Path:
    folder = job.run_dir / "checkpoints" / f"step-{step:08d}"
    tensors = {"weight/a": torch.full((2, 3), float(step)), "exp_avg/a": torch.zeros(2, 3)}
    state = {"step": step, "optimizer_steps": step, "loss_scale": None, "recipe": fingerprint(job.recipe)}
    _write(folder, tensors, state)
    return folder


def test_the_newest_is_taken(job: MakeJob) -> None:
    assert latest_checkpoint(job()) is None
    for step in (9, 10, 2):
        write(job(), step)
    found = latest_checkpoint(job())
    assert found.state["step"] == 10
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 3)), "frozen": nn.Parameter(torch.zeros(1), False)})
    load_weights(model, found)
    assert (model["a"] == 10).all()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit of the tensors": lambda folder: flip(folder / "state.safetensors"),
    "tensors cut short": lambda folder: (folder / "state.safetensors").write_bytes(b"\x00" * 8),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "state cut short": lambda folder: (folder / "state.json").write_text('{"step": 2'),
    "state of something else": lambda folder: (folder / "state.json").write_text("[1]"),
    "state without its hash": lambda folder: (folder / "state.json").write_text('{"step": 2}'),
    "state without its recipe": lambda folder: without_recipe(folder / "state.json"),
}


def without_recipe(path: Path) -> None:
    state = json.loads(path.read_text())
    del state["recipe"]
    path.write_text(json.dumps(state))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_taken(
    damage: str, job: MakeJob, said: pytest.LogCaptureFixture
) -> None:
    write(job(), 1)
    newest = write(job(), 2)
    DAMAGE[damage](newest)
    assert latest_checkpoint(job()).state["step"] == 1
    (warning,) = [r.getMessage() for r in said.records if r.levelno == logging.WARNING]
    assert warning.startswith(f"checkpoint {newest} is damaged (")


def test_an_unfinished_one_is_not_seen(job: MakeJob) -> None:
    first = write(job(), 1)
    first.rename(first.with_name("step-00000009.partial"))
    assert latest_checkpoint(job()) is None
    write(job(), 9)  # what an interrupted run left behind is no obstacle
    assert latest_checkpoint(job()).state["step"] == 9
    assert not list((job().run_dir / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("optimizer.lr=0.5", "optimizer"),
        ("train.batch_size=16", "train"),
        ("train.steps_per_epoch=60", "train"),
        ("data.datasets.0.weight=3", "data"),
        ("data.only=[chat]", "data"),
        ("text.end_sym=x", "text"),
        ("model.lora_r=2", "model"),
        ("seed=1", "seed"),
        ("stage=2", "stage"),
    ],
)
def test_another_recipe_is_refused(override: str, section: str, job: MakeJob) -> None:
    folder = write(job(), 1)
    with pytest.raises(CheckpointError, match=rf"{folder} is of another recipe: {section} differ.*recipe\.yaml"):
        latest_checkpoint(job(override))


@pytest.mark.parametrize(
    "override",
    [
        "train.log_every=3",
        "train.micro_batch_size=4",
        "train.checkpoint_every=7",
        "train.validation_samples=5",
        "train.max_overflows=5",
        "train.wandb=project",
        "data.num_workers=2",
        "data.only=[vqa, text, chat, pair]",
        "model.gradient_checkpointing=true",
        "deepspeed.zero_optimization.stage=3",
    ],
)
def test_what_changes_no_number_may_change(override: str, job: MakeJob) -> None:
    write(job(), 1)
    assert latest_checkpoint(job(override)).state["step"] == 1


def test_other_parameters_are_refused(job: MakeJob) -> None:
    write(job(), 1)
    model = nn.ParameterDict({"b": nn.Parameter(torch.zeros(2, 3))})
    with pytest.raises(CheckpointError, match="other parameters than this stage trains"):
        load_weights(model, latest_checkpoint(job()))


def test_old_ones_go(job: MakeJob) -> None:
    folders = [write(job(), step) for step in (1, 2, 3, 10)]
    _remove_old(folders[0].parent, keep=2)
    assert [folder.exists() for folder in folders] == [False, False, True, True]


def test_lines_of_steps_to_be_repeated_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + '{"step": 4, "tr')
    forget_after(metrics, 2)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
