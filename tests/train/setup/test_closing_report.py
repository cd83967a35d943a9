"""The last lines of a run: its commands are ones that the command line takes, whatever paths hold."""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinygptv_ds.apps.chat import add_arguments as chat_arguments
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.evaluation.cli import add_arguments as eval_arguments
from tinygptv_ds.train.setup.closing_report import closing_report, next_commands

RAW = Callable[..., dict[str, Any]]
SHARDS = {"kind": "caption", "shards": "my data/{0..3}.tar", "instruction": "What's $this?"}


def parsed(line: str, add: Callable[..., None]) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add(parser)
    return vars(parser.parse_args(shlex.split(line)[2:]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"evaluation": {"benchmarks": [SHARDS]}},
            {"kind": "caption", "shards": SHARDS["shards"], "instruction": "What's $this?"},
        ),
        (
            {"evaluation": {"benchmarks": [{"kind": "refcoco", "root": "a b"}]}},
            {"kind": "refer", "benchmarks": "refcoco"},
        ),
        ({"evaluation": {"benchmarks": [{"kind": "gqa", "root": "a b"}]}}, {"kind": "vqa", "root": Path("a b")}),
        ({"data__validation": [{"name": "v", "shards": "held out"}]}, {"kind": "vqa", "shards": "held out"}),
        ({}, {"kind": "vqa", "shards": "SHARDS"}),
    ],
)
def test_commands_can_be_pasted(changes: dict[str, Any], expected: dict[str, Any], raw_recipe: RAW) -> None:
    folder = Path("runs/it's mine")
    chat, evaluation, *_ = next_commands(build_recipe(raw_recipe(**changes), "test"), folder)
    assert parsed(chat, chat_arguments)["model"] == folder
    found = parsed(evaluation, eval_arguments)
    assert found["model"] == folder and expected.items() <= found.items()


def test_the_next_stage_starts_from_it(raw_recipe: RAW) -> None:
    lines = [next_commands(build_recipe(raw_recipe(stage=stage), "test"), Path("r")) for stage in (1, 2, 3, 4)]
    assert [line[3:] for line in lines] == [
        *([f"tinygptv-ds train stage{n} --set model.init_from=r"] for n in (2, 3, 4)),
        [],
    ]
    assert lines[0][2] == "tinygptv-ds export r --out my_model"


def test_damaged_metrics_are_survived(raw_recipe: RAW, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/provenance.json").write_text("{}")
    lines = [{"train/loss": 2.0}, {"val/loss": 1.5}, {"train/loss": 1.0, "train/lr": 3}, {"eval/mine/strict": 90.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    job = SimpleNamespace(run_dir=tmp_path)
    run = SimpleNamespace(job=job, recipe=build_recipe(raw_recipe(), "test"), last_step=9, first_step=4, began=0.0)
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\0\n[1]\n" + text.encode() + b'{"train/lo')
    first, second, *_ = closing_report(run)
    assert first.startswith("finished: 9 steps, resumed at step 4, ")
    assert first.endswith("; train/loss 1.0000, val/loss 1.5000, eval/mine/strict 90.0000")
    assert second == f"model: {tmp_path}/model"
    (tmp_path / "metrics.jsonl").unlink()
    assert ";" not in closing_report(run)[0]
