"""DeepSpeed's JSON: mistakes that DeepSpeed would ignore are refused, and the recipe completes the file."""

from pathlib import Path
from typing import Any

import pytest

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.config.deepspeed import load_deepspeed_json, precision, resolve_deepspeed, zero_stage
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.config.recipe import ModelSection, Recipe
from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "stages").rglob("*.yaml"))
PLAIN = {"gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}


def recipe(clipping: float | None = None, **deepspeed: Any) -> Recipe:
    return Recipe(
        stage=1,
        model=ModelSection("p", "e", "q"),
        data=DataSection([DatasetSection("a", "a")]),
        optimizer=OptimizerSection(lr=1e-4, min_lr=0.0, gradient_clipping=clipping),
        train=TrainSection(batch_size=12, micro_batch_size=2),
        deepspeed=deepspeed,
    )


def resolve(raw: dict[str, Any], of: Recipe | None = None, world_size: int = 2) -> dict[str, Any]:
    return resolve_deepspeed(raw, of or recipe(), world_size, "my.json")


def test_the_recipe_completes_it() -> None:
    resolved = resolve(PLAIN | {"comment": "mine"})
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (12, 2)
    assert resolved["gradient_accumulation_steps"] == 3
    assert "comment" not in resolved
    assert resolved["timers"] == {"throughput": {"enabled": False}}, "else every micro-step waits for the GPU twice"
    assert "train_batch_size" not in PLAIN


def test_the_recipe_changes_it() -> None:
    """`deepspeed.*` of the recipe overrides the file, nested keys one by one."""
    raw = {"gradient_clipping": 0.0, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    resolved = resolve(raw, recipe(zero_optimization={"stage": 3}, steps_per_print=5))
    assert resolved["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert resolved["steps_per_print"] == 5
    assert zero_stage(resolved) == 3
    assert raw["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean zero_optimization?"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean gradient_clipping?"),
        ({"elasticity": {}}, "leave out 'elasticity'; DeepSpeed has removed it; a checkpoint here resumes"),
        ({"optimizer": {"type": "AdamW"}}, "leave out 'optimizer'; it comes from the recipe's optimizer section"),
        ({"scheduler": {}}, "leave out 'scheduler'"),
        ({"tensorboard": {}}, "leave out 'tensorboard'"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto"'),
        ({"gradient_clipping": "auto"}, 'gradient_clipping is "auto"'),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "leave out bf16.check_grad_overflow"),
        ({"train_batch_size": "auto"}, 'train_batch_size is "auto"'),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
        ({"train_batch_size": 8}, "train_batch_size is 8, but the recipe's train.batch_size make it 12"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4"),
        ({"gradient_accumulation_steps": 1}, r"gradient_accumulation_steps is 1, .* 2 rank\(s\) make it 3"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "bf16 and torch_autocast are both"),
        ({"torch_autocast": {"enabled": True, "dtype": "bf16"}}, "torch_autocast.dtype is 'bf16'"),
        ({"zero_optimization": {"stage": 0}}, "use ZeRO stage 1, 2 or 3"),
        ({"zero_optimization": {}}, "use ZeRO stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"my.json: .*{message}"):
        resolve(PLAIN | change)


def test_clipping_must_be_written_and_agree() -> None:
    """Without the key, DeepSpeed 0.19 clips at 1.0."""
    without = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match="write gradient_clipping"):
        resolve(without)
    assert resolve(without, recipe(clipping=0.5))["gradient_clipping"] == 0.5
    assert resolve(PLAIN, recipe(clipping=0.0))["gradient_clipping"] == 0.0
    with pytest.raises(ConfigError, match=r"gradient_clipping is 0.0, the recipe's optimizer.gradient_clipping 0.5"):
        resolve(PLAIN, recipe(clipping=0.5))


def test_values_that_agree_may_be_in_both() -> None:
    same = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6}
    assert resolve(PLAIN | same, world_size=1) == resolve(PLAIN, world_size=1)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "{'a': 1}", b"\xff\xfe"])
def test_a_bad_file_is_named(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"my\.json"):
        load_deepspeed_json(path)
    with pytest.raises(ConfigError, match=r"no DeepSpeed JSON at .*; ds_configs/ holds the ready ones"):
        load_deepspeed_json(tmp_path / "none.json")


def test_the_ready_ones_are_what_their_names_say() -> None:
    found = {path.stem: load_deepspeed_json(path) for path in JSONS}
    assert {"cpu", "zero3_offload", "zero3_nvme", "zeropp"} <= found.keys()
    for name in ("zero1_bf16", "zero2_bf16", "zero2_fp16", "zero3_bf16", "zero3_fp16"):
        assert f"zero{zero_stage(found[name])}_{precision(found[name])}" == name
    assert precision(found["cpu"]) == "fp32"
    assert {zero_stage(found[name]) for name in ("zero3_offload", "zero3_nvme", "zeropp")} == {3}
    assert all(raw["gradient_clipping"] == 0.0 for raw in found.values())


@pytest.mark.parametrize("json_file", JSONS, ids=lambda path: path.stem)
def test_deepspeed_accepts_it_with_every_recipe(json_file: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for recipe_file in RECIPES:
        loaded = load_recipe(recipe_file, ["deepspeed.zero_optimization.zero_hpz_partition_size=1"])
        resolved = resolve_deepspeed(load_deepspeed_json(json_file), loaded, 1, json_file.name)
        accepted = DeepSpeedConfig(resolved)
        assert accepted.gradient_clipping == resolved["gradient_clipping"]
        assert accepted.zero_config.stage == zero_stage(resolved)
        assert accepted.train_batch_size == load_recipe(recipe_file).train.batch_size
        sixteen_bit = accepted.torch_autocast_enabled or accepted.bfloat16_config.enabled
        assert sixteen_bit == (precision(resolved) != "fp32")
