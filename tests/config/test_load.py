"""From YAML and `--set` to a recipe, and the messages about mistakes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tinygptv_ds.config.load import apply_overrides, build_recipe, load_recipe, recipe_dict
from tinygptv_ds.errors import ConfigError


def minimal() -> dict[str, Any]:
    return {
        "stage": 1,
        "model": {"phi": "p", "eva_vit": "e", "qformer": "q"},
        "data": {"datasets": [{"name": "a", "shards": "a/*.tar"}, {"name": "b", "shards": "b"}]},
        "optimizer": {"lr": 1e-4, "min_lr": 0},
        "train": {"batch_size": 12, "micro_batch_size": 2},
    }


def changed(*overrides: str) -> dict[str, Any]:
    return apply_overrides(minimal(), overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys: the nearest known one, or all that there are
        ("trian.batch_size=1", "unknown key trian; did you mean train?"),
        ("train.batchsize=1", "unknown key train.batchsize; did you mean batch_size?"),
        ("optimizer.learning_speed_of_it=1", "unknown key optimizer.learning_speed_of_it; known here: lr, min_lr"),
        ("data.datasets.1.wieght=2", r"unknown key data.datasets\[1\].wieght; did you mean weight?"),
        # wrong types
        ("train.batch_size=many", "train.batch_size must be a whole number, not 'many'"),
        ("train.batch_size=1.5", "train.batch_size must be a whole number, not 1.5"),
        ("train.batch_size=true", "train.batch_size must be a whole number, not True"),
        ("train.batch_size=", "train.batch_size must be a whole number, not empty"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, not 'fast'"),
        ("model.gradient_checkpointing=all", "model.gradient_checkpointing must be true, false or a whole number, not"),
        ("model.gradient_checkpointing=-1", "model.gradient_checkpointing must be true, false or N from 1 on"),
        ("model.phi=3", "model.phi must be text, not 3"),
        ("data.datasets=a", "data.datasets must be a list, not 'a'"),
        ("data.datasets=[a]", r"data.datasets\[0\] must be a mapping of keys to values, not 'a'"),
        ("model=tiny", "model must be a mapping of keys to values, not 'tiny'"),
        ("deepspeed=[]", "deepspeed must be a mapping"),
        # values out of range
        ("stage=5", "stage must be 1, 2, 3 or 4, not 5"),
        ("train.epochs=0", "train.epochs must be positive"),
        ("train.loss_reduction=sum", "train.loss_reduction must be one of step_mean, micro_batch_mean"),
        ("model.attention=fast", "'fast' is not one of auto, flash_attn_3, flash_attn, torch_varlen, sdpa"),
        ("model.lora_targets=[fc3]", r"unknown \['fc3'\]"),
        ("text.prompt_template=no place", "text.prompt_template must hold {} exactly once"),
        ("data.datasets=[]", "name at least one dataset"),
        ("data.datasets.1.name=a", "a appears more than once"),
        ("data.only=[c, b]", "data.only: 'c' is none of data.datasets; known here: a, b"),
        ("data.only=b", "data.only must be a list, not 'b'"),
        ("data.datasets.0.weight=0", "data.datasets, a: weight must be positive"),
        ("data.max_skipped_share=2", r"must be in \[0, 1\]"),
        ("data.decoding=draft", r"'draft' is not one of exact, fast"),
        ("model.train=[]", "model.train is empty; null trains what the stage trains as published"),
        ("model.train=[norm]", "model.train: 'norm' is no part of the model; did you mean norms?"),
        ("model.train=[lora]", "model.train names lora, but model.lora_r is 0"),
        ("optimizer.schedule=cosin", "optimizer.schedule: 'cosin' is unknown; did you mean cosine?"),
        ("optimizer.schedule=wsd", "schedule wsd needs optimizer.decay_steps above 0"),
        ("optimizer.decay_steps=5", "decay_steps is of the schedule wsd"),
        ("optimizer.lr_scale={Qformer: 0.1}", "optimizer.lr_scale: 'Qformer' is no part of the model; did you mean"),
        ("optimizer.lr_scale={qformer: 0}", "optimizer.lr_scale.qformer must be a positive number, not 0"),
        ("optimizer.lr_scale={qformer: fast}", "optimizer.lr_scale.qformer must be a positive number, not 'fast'"),
        ("train.startup_minutes=0", "train.startup_minutes must be positive"),
        ("train.lost_after_seconds=-1", "train.lost_after_seconds must be 0 or more"),
        ("data.read_timeout_seconds=1200", r"\(1200\) must be below train.step_minutes \(1200 s\)"),
        ("train.cycles=0", "train.cycles must be positive"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be two numbers"),
    ],
)
def test_a_bad_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^my.yaml: .*{message}"):
        build_recipe(changed(override), "my.yaml")


@pytest.mark.parametrize("missing", ["stage", "model", "model.phi", "optimizer.min_lr", "train.batch_size"])
def test_a_missing_key_is_named(missing: str) -> None:
    raw = minimal()
    *path, last = missing.split(".")
    node = raw[path[0]] if path else raw
    del node[last]
    with pytest.raises(ConfigError, match=f"my.yaml: {missing} is missing"):
        build_recipe(raw, "my.yaml")


def test_set_reaches_everywhere() -> None:
    recipe = build_recipe(
        changed(
            "train.batch_size=32",
            "optimizer.lr=1e-5",  # YAML 1.1 reads this as text
            "optimizer.betas=[0.8, 0.9]",
            "optimizer.min_lr=1",
            "data.datasets.1.weight=2.5",
            "text.end_sym='###'",
            "text.prompt_template='Q: {} = A:'",
            "model.init_from=null",
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.gradient_clipping=1.0",
        ),
        "my.yaml",
    )
    assert recipe.train.batch_size == 32
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-5, [0.8, 0.9])
    assert isinstance(recipe.optimizer.min_lr, float)
    assert [d.weight for d in recipe.data.datasets] == [1.0, 2.5]
    assert (recipe.text.end_sym, recipe.text.prompt_template) == ("###", "Q: {} = A:")
    assert recipe.model.init_from is None
    assert recipe.deepspeed == {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}


def test_only_some_of_the_datasets() -> None:
    """Datasets keep the recipe's order and weights, regardless of the order of the names; no name selects all."""
    only = changed("data.datasets.1.weight=3", "data.only=[b]")
    assert [(d.name, d.weight) for d in build_recipe(only, "my.yaml").data.used] == [("b", 3.0)]
    both = build_recipe(changed("data.only=[b, a]"), "my.yaml")
    assert both.data.used == build_recipe(minimal(), "my.yaml").data.used == both.data.datasets


def test_later_overrides_win_and_the_original_stays() -> None:
    raw = minimal()
    assert apply_overrides(raw, ["train.batch_size=4", "train.batch_size=8"])["train"]["batch_size"] == 8
    assert apply_overrides(raw, ["data.datasets.0.name=z"])["data"]["datasets"][0]["name"] == "z"
    assert raw == minimal()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size", "write key=value"),
        ("=3", "write key=value"),
        ("train.betas=[0.9", "not valid YAML"),
        ("text.prompt_template=Q: {} A:", "not valid YAML .text may need quotes"),
        ("train={batch_size: 1, batch_size: 2}", "batch_size is given twice"),
        ("data.datasets.2.weight=1", "'2' is not an index of a list of 2"),
        ("data.datasets.first.weight=1", "'first' is not an index"),
        ("train.batch_size.x=1", "nothing below 12"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: 1\nmodel: {phi: a, phi: b}\n", "my.yaml: line 2: model.phi is given twice"),
        ("stage: 1\nstage: 2\n", "stage is given twice"),
        ("stage: [1\n", "my.yaml: not valid YAML"),
        ("- 1\n", "holds no recipe"),
        ("", "holds no recipe"),
        ("stage: \x00", "not valid YAML"),
        ("model: !!python/object:os.system {}\n", "line 1, model: the tag .* is not supported"),
        ("? [a, b]\n: 1\n", "line 1: a key must be text"),
    ],
)
def test_a_bad_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "my.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe at .*none.yaml; the published ones are stages/stage1.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin1.yaml").write_bytes(b"stage: 1 # caf\xe9\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_recipe(tmp_path / "latin1.yaml")


def test_a_recipe_written_down_is_the_same_recipe(tmp_path: Path) -> None:
    """A run directory's recipe.yaml repeats the run."""
    recipe = build_recipe(changed('text.end_sym="\\n"', "deepspeed.gradient_clipping=1.0", "seed=7"), "my.yaml")
    assert recipe.text.end_sym == "\n"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe_dict(recipe)))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_run_directory_of_an_earlier_version_loads() -> None:
    """Its recipe has `train.wandb`, which two keys have replaced."""
    recipe = build_recipe(changed("train.wandb=null"), "my.yaml")
    assert recipe == build_recipe(minimal(), "my.yaml") and recipe.train.trackers == []
    train = build_recipe(changed("train.wandb=mine"), "my.yaml").train
    assert (train.trackers, train.tracker_project) == (["wandb"], "mine")
    with pytest.raises(ConfigError, match=r"unknown key train\.wandb"):
        build_recipe(changed("train.wandb=[mine]"), "my.yaml")
