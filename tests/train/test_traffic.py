"""The bytes that `estimate` counts are those that real ranks reduce and gather, collective by collective."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import ended

from benchmarks import collectives
from benchmarks.traffic import FINE, counted_payload, key, measured_payload, step_of, zero_of
from tinygptv_ds.config.deepspeed_json import load_deepspeed_json, resolve_deepspeed
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.data.stream import Planner, open_stream
from tinygptv_ds.train.traffic import (
    checkpoint_traffic,
    step_traffic,
)

ROOT = Path(__file__).parents[2]
ALL = ("projections", "norms", "lora")
STEPS, SETTLED = 3, 2  # by then ZeRO-3 knows in which order weights are used


@pytest.fixture
def unlike(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A recipe whose two ranks begin with unlike micro-batches, one with a picture and one without."""
    few = {"micro_batch_size": 1, "batch_size": 4, "steps_per_epoch": STEPS, "sample_count": 0}
    raw = raw_recipe(**{f"train__{name}": value for name, value in few.items()}, data__only=["vqa", "text"])
    raw["data"]["datasets"][1]["weight"] = 3
    raw["model"]["resid_dropout"] = 0.1
    path = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    plan = Planner(open_stream(load_recipe(path)), 2).plan(0)
    assert {plan.micro_batch(0, rank)[0].dataset for rank in range(2)} == {"vqa", "text"}
    return path


@pytest.mark.parametrize(
    ("json_file", "changes"),
    [("zero2_bf16", ()), ("zero3_bf16", (*FINE, "model.gradient_checkpointing=2"))],
)
def test_two_ranks_send_what_is_counted(unlike: Path, tmp_path: Path, json_file: str, changes: tuple[str, ...]) -> None:
    file, noted = ROOT / f"ds_configs/{json_file}.json", tmp_path / "noted.json"
    options = [part for change in changes for part in ("--set", change)]
    ended(
        unlike,
        tmp_path / "run",
        "--deepspeed_config",
        str(file),
        *options,
        ranks=2,
        fault=collectives.note,
        file=noted,
    )
    recipe = load_recipe(unlike, list(changes))
    step, zero = step_of(recipe, 2), zero_of(resolve_deepspeed(load_deepspeed_json(file), recipe, 2, json_file))
    saved = checkpoint_traffic(step, zero)
    expected = counted_payload(step_traffic(step, zero))
    measured = measured_payload(json.loads(noted.read_text()), SETTLED)
    assert measured.pop(key(saved.what, saved.kind, 2)) == saved.payload
    assert measured == expected
