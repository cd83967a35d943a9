"""A run directory that holds a finished run: reused by the same command, refused by another, with what to do."""

import os
from pathlib import Path

import pytest
import yaml
from helpers import tiny
from test_user_errors import stage

from tinygptv_ds.config.load import build_recipe, recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError, Finished
from tinygptv_ds.train.setup.finished import check_finished


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The run that the other one begins from."""
    (tmp_path / "first/model").mkdir(parents=True)
    (tmp_path / "first/model/provenance.json").write_text("{}")
    os.utime(tmp_path / "first/model/provenance.json", (1000, 1000))
    return tmp_path / "first"


@pytest.fixture
def recipe(first: Path, tmp_path: Path) -> Recipe:
    return build_recipe(tiny.recipe(tmp_path, {"a": tmp_path}, model__init_from=str(first)), "test")


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    """A finished run of that recipe."""
    run = tmp_path / "run"
    (run / "checkpoints/step-00000006").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "model/provenance.json").write_text("{}")
    (run / "model/trained.safetensors").touch()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(recipe)))
    return run


def test_the_same_command(recipe: Recipe, run: Path) -> None:
    with pytest.raises(Finished) as found:
        check_finished(run, recipe, "auto")
    longer = f"--run-dir ANOTHER --resume {run}/checkpoints/step-00000006 --resume-anyway with more train.epochs"
    assert (
        str(found.value) == f"{run} is complete: reused. To train it again, remove it; to train it for longer, {longer}"
    )


def test_an_unfinished_run(recipe: Recipe, run: Path) -> None:
    (run / "model").rename(run / "model.partial")
    check_finished(run, recipe, "auto")


def test_another_command(recipe: Recipe, run: Path, first: Path, tmp_path: Path) -> None:
    """Another recipe, weights to begin from that are newer, another checkpoint, or a recipe that is damaged."""
    raw = tiny.recipe(tmp_path, {"a": tmp_path}, model__init_from=str(first), train__epochs=2)
    with pytest.raises(
        ConfigError, match=r"of another recipe \(train.epochs: 1 there, 2 here\); choose another --run-dir"
    ):
        check_finished(run, build_recipe(raw, "test"), "auto")
    with pytest.raises(ConfigError, match=r"which --resume never does not go on from; .* to train it for longer"):
        check_finished(run, recipe, "never")
    (first / "model/provenance.json").touch()
    os.utime(run / "model/provenance.json", (2000, 2000))
    with pytest.raises(ConfigError, match=r"but .*first, which it began from, has been written since"):
        check_finished(run, recipe, "auto")
    (run / "recipe.yaml").write_text("{")
    with pytest.raises(ConfigError, match="whose recipe cannot be compared"):
        check_finished(run, recipe, "auto")


def test_a_stage_that_is_started_again(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    """Exit code 0, one line, nothing loaded: the weights and shards of the recipe are not there."""
    again = tiny.write_recipe(
        tmp_path / "recipe.yaml", tiny.recipe(tmp_path, {"a": tmp_path}, model__init_from=str(tmp_path / "first"))
    )
    done = stage(4, "--recipe", str(again), "--deepspeed_config", "ds_configs/cpu.json", "--run-dir", str(run))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{run} is complete: reused. ")
