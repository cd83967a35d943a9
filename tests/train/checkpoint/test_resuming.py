"""The checkpoint that a run resumes from: a damaged one is named, another run's refused, an unfinished one ignored."""

import errno
import fcntl
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import nn

from tinygptv_ds.config.load import apply_overrides, build_recipe
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.errors import CheckpointError, ConfigError
from tinygptv_ds.files import fingerprint_differences
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint.folders import complete_ones, step_of
from tinygptv_ds.train.checkpoint.resume import Checkpoint, began_from, choose_checkpoint, load_weights, open_checkpoint
from tinygptv_ds.train.checkpoint.run_fingerprint import run_fingerprint
from tinygptv_ds.train.checkpoint.storage import Snapshot, remove_old, write_checkpoint
from tinygptv_ds.train.metrics.reporter import forget_after
from tinygptv_ds.train.setup import run_dir_lock as lock
from tinygptv_ds.train.setup.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def job(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> MakeJob:
    """Return a function that gives the same run with other values, as with `--set`."""

    def make(*overrides: str, resume: object = "auto", run: str = "run", anyway: bool = False) -> Job:
        recipe = build_recipe(apply_overrides(raw_recipe(), overrides), "test")
        return Job(recipe, {}, tmp_path / run, str(resume), Ranks(0, 0, 1, 1), resume_anyway=anyway)

    return make


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    return caplog


def facts(job: Job) -> dict[str, Any]:
    return run_fingerprint(job.recipe, open_stream(job.recipe))


def write(job: Job, step: int, began_from: str | None = None) -> Path:
    tensors = {"weight/a": torch.full((2, 3), float(step))}
    tensors |= {f"{moment}/a": torch.zeros(2, 3) for moment in ("exp_avg", "exp_avg_sq")}
    state = {"step": step, "optimizer_steps": step, "loss_scale": None, "must_match": facts(job)}
    return write_checkpoint(job.run_dir / "checkpoints", Snapshot(tensors, state | {"began_from": began_from}))


def chosen(job: Job) -> Path | None:
    found = choose_checkpoint(job, facts(job))
    return None if found is None else Path(found)


def test_the_newest_is_taken(job: MakeJob) -> None:
    assert chosen(job()) is None
    for step in (9, 10, 2):
        write(job(), step)
    found = open_checkpoint(chosen(job()))
    assert found.state["step"] == 10
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 3)), "frozen": nn.Parameter(torch.zeros(1), False)})
    load_weights(model, found)
    assert (model["a"] == 10).all()


def test_none_is_taken_where_none_is_whole(job: MakeJob) -> None:
    """Starting over when no checkpoint can be read would hide that weeks of training are lost."""
    (write(job(), 1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoint\(s\) in .* is complete"):
        chosen(job())


def test_an_unfinished_one_is_not_seen(job: MakeJob) -> None:
    first = write(job(), 1)
    first.rename(first.with_name("step-00000009.partial"))
    assert chosen(job()) is None
    assert not list(first.parent.iterdir())  # what an interrupted run left behind goes
    first = write(job(), 9)
    first.rename(first.with_name("step-00000009.partial"))
    assert step_of(write(job(), 9)) == 9  # nor is it an obstacle


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("optimizer.lr=0.5", "optimizer.lr: 0.003 in the checkpoint, 0.5 here"),
        ("train.batch_size=16", "train.batch_size: 8 in the checkpoint, 16 here"),
        ("train.steps_per_epoch=60", "train.steps_per_epoch: 6 in the checkpoint, 60 here"),
        ("data.datasets.0.weight=3", "data.datasets.vqa.weight: 1.0 in the checkpoint, 3.0 here"),
        ("data.only=[chat]", "data.datasets.vqa.weight: 1.0 in the checkpoint, nothing here"),
        ("text.end_sym=x", 'text.end_sym: "###" in the checkpoint, "x" here'),
        ("model.lora_r=2", "model.lora_r: 4 in the checkpoint, 2 here"),
        ("data.validation_share=0.5", 'samples of vqa: "12 in 3 shard(s), '),
        ("seed=1", "seed: 7 in the checkpoint, 1 here"),
        ("stage=2", "stage: 4 in the checkpoint, 2 here"),
    ],
)
def test_another_recipe_is_refused(override: str, field: str, job: MakeJob, said: pytest.LogCaptureFixture) -> None:
    folder = write(job(), 1)
    with pytest.raises(CheckpointError) as caught:
        chosen(job(override))
    assert str(caught.value).startswith(f"{folder} is of another recipe, other data or other base weights:\n  - ")
    assert f"  - {field}" in str(caught.value)
    assert "--resume-anyway" in str(caught.value)
    said.clear()
    assert chosen(job(override, anyway=True)) == folder
    assert f"  - {field}" in said.text


@pytest.mark.parametrize(
    "override",
    [
        "train.log_every=3",
        "train.micro_batch_size=4",
        "train.checkpoint_every=7",
        "train.validation_samples=5",
        "train.max_overflows=5",
        "train.trackers=[mlflow]",
        "train.tracker_project=mine",
        "train.checkpoint_minutes=7",
        "train.keep_every=7",
        "train.deepspeed_checkpoints=true",
        "data.num_workers=2",
        "data.only=[vqa, text, chat, pair]",
        "model.gradient_checkpointing=true",
        "deepspeed.zero_optimization.stage=3",
    ],
)
def test_what_changes_no_number_may_change(override: str, job: MakeJob) -> None:
    folder = write(job(), 1)
    assert chosen(job(override)) == folder


def test_other_data_other_weights_another_tokenizer(job: MakeJob, weights: Path, tmp_path: Path) -> None:
    """Data and weights are compared by content: the same under another path is the same."""
    here = facts(job())
    copy = shutil.copytree(weights, tmp_path / "copy")
    paths = {part: copy / name for part, name in (("phi", "phi"), ("eva_vit", "eva_vit_g.pth"))}
    moved = job(*(f"model.{part}={path}" for part, path in paths.items()))
    assert facts(moved) == here

    (tokenizer,) = copy.glob("phi/tokenizer.json")
    tokenizer.write_text(tokenizer.read_text().replace('"red"', '"der"') + " ")
    assert names(here, facts(moved)) == ["tokenizer of model.phi"]
    config = copy / "phi/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "0", "resid_pdrop": 0.5}))
    assert names(here, facts(moved)) == ["configuration of model.phi", "tokenizer of model.phi"]
    flip(copy / "eva_vit_g.pth", -1)
    (copy / "phi/model.safetensors").write_bytes((weights / "phi/model.safetensors").read_bytes() + b" ")
    assert {"weights of model.phi", "weights of model.eva_vit"} < set(names(here, facts(moved)))

    other = tiny.write_shards(tmp_path / "other", tiny.samples("vqa", 11))
    (line,) = fingerprint_differences(here, facts(job(f"data.datasets.0.shards={other}"))).values()
    assert line.startswith('samples of vqa: "12 in 3 shard(s), ') and '"11 in 3 shard(s), ' in line
    renamed = shutil.copytree(job().recipe.data.datasets[0].shards, tmp_path / "renamed")
    for path in list(renamed.glob("00000.*")):
        path.rename(path.with_name(path.name.replace("00000.", "00009.")))
    assert names(here, facts(job(f"data.datasets.0.shards={renamed}"))) == ["samples of vqa"]


def names(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return sorted(fingerprint_differences(there, here))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_other_parameters_are_refused(job: MakeJob) -> None:
    found = open_checkpoint(write(job(), 1))
    model = nn.ParameterDict({"b": nn.Parameter(torch.zeros(2, 3))})
    with pytest.raises(CheckpointError, match="other parameters than this stage trains"):
        load_weights(model, found)
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 1))})
    with pytest.raises(CheckpointError, match=r"a is \[2, 3\], here \[2, 1\]"):
        load_weights(model, found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(value: float) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.full((1,), value)}
    found = Checkpoint(Path("step-3"), {}, frozenset(tensors), lambda _, name: tensors[name])
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(tensor)) for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"step-3: weight of b holds NaN or Inf, .* --resume PATH"):
        load_weights(model, found)


# ---- a checkpoint that is named --------------------------------------------------------------------------------------


def test_one_of_another_run(job: MakeJob) -> None:
    """A run starts from it, and resumes from its own checkpoints each time the same command is repeated."""
    given = write(job(run="other"), 4)
    mine = job(resume=given)
    assert chosen(mine) == given and began_from(mine, given) == str(given)
    own = write(mine, 5, began_from(mine, given))
    assert chosen(mine) == own and began_from(mine, own) == str(given)
    other = job(resume=write(job(run="third"), 4))
    with pytest.raises(CheckpointError, match=r"has checkpoints of its own, which do not come from .*--resume auto"):
        chosen(other)


def test_an_earlier_one_of_the_run(job: MakeJob) -> None:
    """The newer ones belong to an abandoned continuation, to which a later `auto` must not return."""
    first, second, third = (write(job(), step) for step in (1, 2, 3))
    assert chosen(job(resume=first)) == first
    assert chosen(job()) == first
    left = sorted(path.name for path in first.parent.iterdir())
    assert left == [first.name, f"{second.name}.aside", f"{third.name}.aside"]


def test_what_is_no_checkpoint(job: MakeJob) -> None:
    run = write(job(run="other"), 4).parents[1]
    with pytest.raises(CheckpointError, match=r"other is no checkpoint.*such as .*step-00000004"):
        chosen(job(resume=run))
    (run / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is no checkpoint"):
        chosen(job(resume=run / "empty"))


# ---- what is kept, and by whom ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(2, 0, [30, 35]), (1, 10, [10, 20, 30, 35]), (2, 25, [25, 30, 35]), (9, 0, None)]
)
def test_old_ones_go(keep: int, keep_every: int, left: list[int] | None, tmp_path: Path) -> None:
    steps = list(range(5, 40, 5))
    for step in steps:
        (tmp_path / f"step-{step:08d}").mkdir()
    remove_old(complete_ones(tmp_path), SimpleNamespace(keep_checkpoints=keep, keep_every=keep_every))
    assert [step_of(folder) for folder in complete_ones(tmp_path)] == (left or steps)
    assert len(list(tmp_path.iterdir())) == len(left or steps)


def test_a_lock_of_another_host_is_explained(tmp_path: Path) -> None:
    """The message explains that a network file system may keep the lock of a node that has crashed."""
    held = lock.lock_run_dir(tmp_path)
    holder = {"host": "node7", "pid": 12, "started": "2026-01-01 00:00:00 UTC"}
    (tmp_path / lock.LOCK).write_text(json.dumps(holder))
    with pytest.raises(ConfigError) as caught:
        lock.lock_run_dir(tmp_path)
    message = str(caught.value)
    assert "in use by another job (process 12 on node7 since 2026-01-01 00:00:00 UTC)" in message
    assert "If node7 has crashed, its lock may have stayed behind on a network file system: " in message
    assert f"remove {tmp_path / lock.LOCK}" in message
    (tmp_path / lock.LOCK).write_text("")
    with pytest.raises(ConfigError, match="in use by another job"):
        lock.lock_run_dir(tmp_path)
    held.release()
    lock.lock_run_dir(tmp_path).release()


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert lock.lock_run_dir(tmp_path) is None
    assert "without locks: nothing keeps a second job out" in said.text


def test_lines_of_steps_to_be_repeated_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + '{"step": 4, "tr')
    forget_after(metrics, 2)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
