"""The benchmark of engine set-ups: each passes the checks for its ranks, and the table tells differences."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import setups
from tinygptv_ds.config.deepspeed import load_deepspeed_json, precision, resolve_deepspeed, zero_stage
from tinygptv_ds.config.deepspeed_rules import check_machine
from tinygptv_ds.config.load import apply_overrides, build_recipe

ROOT = Path(__file__).parents[2]


def test_every_setup_is_what_it_is_called(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    for setup in setups.SETUPS:
        recipe = build_recipe(apply_overrides(raw_recipe(), setup.changes), setup.name)
        raw = load_deepspeed_json(ROOT / f"ds_configs/{setup.json_file}.json")
        resolved = resolve_deepspeed(raw, recipe, setup.ranks, setup.name)
        check_machine(resolved, has_gpu=False, source=setup.name)
        assert setup.name.startswith(f"ZeRO-{zero_stage(resolved)}")
        assert precision(resolved) == setup.precision
        assert ("offload" in setup.name) == ("offload_param" in resolved["zero_optimization"])
    assert {dataclasses.astuple(setup)[:3] for setup in setups.SETUPS} >= {("ZeRO-3", "bf16", 2), ("ZeRO-3", "fp32", 2)}


def test_the_table() -> None:
    losses = [[5.0 + number / 1000] * setups.STEPS for number in range(len(setups.SETUPS))]
    head, rule, *rows = setups.table(losses)
    assert len(rows) == len(setups.SETUPS)
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert rows[0].endswith("| 0.0e+00 | 0.0e+00 |") and rows[4].endswith("| 4.0e-03 | 4.0e-03 |")
    assert rows[6].startswith("| bf16 | 2 | ZeRO-1 |") and rows[6].endswith("| 1.0e-03 | 6.0e-03 |")
