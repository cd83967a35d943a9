"""The table of stages and cards in docs/finetune.md is what `estimate` counts."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.finetune.devices import Devices, fit

ROOT = Path(__file__).parents[2]
CARDS = (8, 12, 16, 24, 40, 48, 80)


@cache
def of_16(stage: int) -> Recipe:
    """The published recipe with steps of 16 samples."""
    recipe = load_recipe(ROOT / f"stages/stage{stage}.yaml")
    return replace(recipe, train=replace(recipe.train, batch_size=16, micro_batch_size=16))


def cell(recipe: Recipe, gib: int) -> str:
    try:
        found = fit(recipe, Devices(1, gib, "a card"))
    except ConfigError:
        return "-"
    how = "offload" if "offload" in found.deepspeed else "recomputed" if found.gradient_checkpointing else ""
    bits = "" if found.frozen_bits is None else f"{found.frozen_bits} bit{' with ViT' if found.quantize_vision else ''}"
    return ", ".join(filter(None, [f"{found.micro_batch_size} {how}".strip(), bits]))


def table() -> list[str]:
    head = ["| stage | " + " | ".join(f"{gib} GB" for gib in CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    return head + [
        f"| {stage} | " + " | ".join(cell(of_16(stage), gib) for gib in CARDS) + " |" for stage in (1, 2, 3, 4)
    ]


def test_it_is_what_is_counted() -> None:
    lines = (ROOT / "docs/finetune.md").read_text().splitlines()
    expected = table()
    if not set(expected) <= set(lines):
        pytest.fail("\n".join(["the table is now:", *expected]))
