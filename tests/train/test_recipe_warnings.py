"""Warnings about recipes that are valid but cannot be meant; none about those that are."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinygptv_ds import cli
from tinygptv_ds.config.load import build_recipe, load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.sample_counts import local_sample_counts
from tinygptv_ds.train.recipe_warnings import recipe_warnings
from tinygptv_ds.train.schedule import learning_rate_of_step

RAW = Callable[..., dict[str, Any]]
STAGES = Path(__file__).parents[2] / "stages"
PUBLISHED_WARMUP = {"optimizer__warmup_steps": 1000, "optimizer__warmup_lr": 1e-6}
SHORT = {"train__epochs": 3, "train__steps_per_epoch": 4}


@pytest.fixture
def mine(raw_recipe: RAW) -> Callable[..., Recipe]:
    """Return a function that makes a sensible recipe over one dataset with changes."""

    def make(**changes: Any) -> Recipe:
        one = {"data__datasets": [{"name": "mine", "shards": "x"}]}
        return build_recipe(raw_recipe(**{**one, **changes}), "test")

    return make


@pytest.mark.parametrize(
    ("changes", "samples", "message"),
    [
        (
            PUBLISHED_WARMUP | SHORT,
            None,
            r"warmup_steps \(1000\) is longer than an epoch of 4 steps .* never exceeds 1e-05 \(0\.33 % of "
            r"optimizer\.lr 0\.003\); --set optimizer\.schedule=cosine --set optimizer\.warmup_steps=1 ",
        ),
        (
            {"optimizer__warmup_steps": 9, **SHORT},
            None,
            r"longer than an epoch of 4 steps .* the learning rate falls back to 0\.001 at each one",
        ),
        (
            {"optimizer__warmup_steps": 11, "train__steps_per_epoch": 12},
            None,
            r"warm-up takes 11 of 12 steps .*; --set optimizer\.warmup_steps=1",
        ),
        ({"optimizer__min_lr": 0.01}, None, r"rises from 0\.003 towards 0\.01: .*--set optimizer\.min_lr=0\.0003"),
        (
            {"optimizer__schedule": "wsd", "optimizer__decay_steps": 2, "optimizer__min_lr": 0.01},
            None,
            r"rises from 0\.003 towards 0\.01",
        ),
        (
            {"optimizer__schedule": "cosine", "optimizer__warmup_lr": 0.01},
            None,
            r"warmup_lr 0\.01 is above optimizer\.lr 0\.003, so the run begins with its highest",
        ),
        (
            {"optimizer__lr": 100},
            None,
            r"optimizer\.lr 100 is far above what AdamW .*--set optimizer\.lr=1e-4",
        ),
        (
            {"train__epochs": 50, "train__steps_per_epoch": 1000, "train__batch_size": 2},
            30,
            r"goes 3,333 times over the 30 samples of mine, .*--set train\.steps_per_epoch=15 --set train\.epochs=10",
        ),
        (
            {"train__batch_size": 64},
            30,
            r"train\.batch_size \(64\) is more than the 30 training samples, .*--set train\.batch_size=7",
        ),
        (
            {"data__validation_share": 0.1, "train__validate_every": 1000, "train__keep_best": "val/loss"},
            None,
            r"train\.validate_every \(1000\) is more than the 6 steps .*nothing to choose from; --set "
            r"train\.validate_every=1",
        ),
    ],
)
def test_what_cannot_be_meant(
    mine: Callable[..., Recipe], changes: dict[str, Any], samples: int | None, message: str
) -> None:
    """There is one warning for each, which names values, consequence and remedy."""
    counts = None if samples is None else {"mine": samples}
    found = recipe_warnings(mine(**changes), counts)
    assert len(found) == 1, found
    assert re.search(message, found[0]), found[0]


def test_the_remedy_against_a_long_warmup_helps(mine: Callable[..., Recipe]) -> None:
    recipe = mine(**PUBLISHED_WARMUP, **SHORT)
    assert max(learning_rate_of_step(step, recipe) for step in range(12)) == pytest.approx(1e-5, rel=0.01)
    mended = mine(**{**PUBLISHED_WARMUP, **SHORT, "optimizer__warmup_steps": 1}, optimizer__schedule="cosine")
    assert max(learning_rate_of_step(step, mended) for step in range(12)) == 3e-3 and not recipe_warnings(mended)


@pytest.mark.parametrize("schedule", ["published", "cosine", "constant", "wsd", "step"])
def test_sensible_recipes_have_none(mine: Callable[..., Recipe], schedule: str) -> None:
    more = {"wsd": {"optimizer__decay_steps": 2}, "step": {"optimizer__decay_rate": 0.5}}.get(schedule, {})
    assert recipe_warnings(mine(optimizer__schedule=schedule, **more), {"mine": 30}) == []


def test_published_recipes_have_only_that_of_stage_4() -> None:
    paths = sorted(STAGES.rglob("stage?.yaml"))
    found = {str(path.relative_to(STAGES)): recipe_warnings(load_recipe(path)) for path in paths}
    assert len(found) == 8
    assert [name for name, warnings in found.items() if warnings] == ["stage4.yaml"]


def test_samples_are_counted_where_they_are_local(mine: Callable[..., Recipe], shards: dict[str, Path]) -> None:
    own = [{"name": "mine", "shards": str(shards["vqa"])}]
    assert local_sample_counts(mine(data__datasets=own)) == {"mine": 12}
    assert local_sample_counts(mine(data__datasets=own, data__validation_share=0.5)) == {"mine": 6}
    assert local_sample_counts(mine()) is None
    remote = [*own, {"name": "far", "shards": "https://127.0.0.1:9/{0..1}.tar"}]
    assert local_sample_counts(mine(data__datasets=remote)) is None


@pytest.mark.parametrize("verb", ["estimate", "check-data"])
def test_verbs_print_them(verb: str, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(optimizer__min_lr=0.01, train__steps_per_epoch=3000)
    cli.main([verb, str(recipe)])
    printed = capsys.readouterr().out
    assert printed.count("\nwarning: ") == 2
    assert "warning: the learning rate rises" in printed and "times over the 12 samples of vqa, " in printed
