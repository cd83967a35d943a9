"""The plan of a fine-tuning: its length, its recipe, and what fits into which memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.finetune import by_hand
from tinygptv_ds.finetune.devices import Devices, fit
from tinygptv_ds.finetune.inputs import source_of
from tinygptv_ds.finetune.recipe import Data, compose
from tinygptv_ds.finetune.schedule import Given, micro_batch_sizes, plan_schedule
from tinygptv_ds.train.schedule import learning_rate_of_step

ROOT = Path(__file__).parents[2]
CPU = Devices(1, None, "CPU")


@pytest.fixture(scope="module")
def published() -> Recipe:
    return load_recipe(ROOT / "stages/stage4.yaml")


def composed(published: Recipe, *overrides: str, devices: Devices = CPU, samples: int = 27, **data: object) -> Recipe:
    return compose(
        stage=4,
        model=replace(published.model, init_from="weights/released.pth"),
        text=published.text,
        width=2560,
        data=Data("data/train", "data/held_out", samples, 3, **data),
        devices=devices,
        title="A title.",
        overrides=overrides,
    ).recipe


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 9, 27, 99, 100, 999, 1_000, 9_999, 10_000, 400_000])
def test_every_length_is_sensible(samples: int, ranks: int) -> None:
    planned = plan_schedule(samples, ranks, 2560)
    assert 3 <= planned.epochs <= 10
    assert planned.batch_size % ranks == 0 and 4 <= planned.batch_size <= 66
    assert 0 <= planned.steps_per_epoch * planned.batch_size - samples < planned.batch_size  # each sample once an epoch
    assert planned.warmup_steps < planned.steps and planned.warmup_steps <= max(1, 0.04 * planned.steps)


def test_larger_sets_take_larger_steps_and_fewer_epochs() -> None:
    plans = [plan_schedule(samples, 1, 2560) for samples in (30, 300, 3_000, 30_000)]
    assert [plan.epochs for plan in plans] == [10, 8, 5, 3]
    assert [plan.batch_size for plan in plans] == [4, 8, 64, 64]


def test_narrow_models_learn_faster() -> None:
    assert plan_schedule(27, 1, 128).lr == pytest.approx(20 * plan_schedule(27, 1, 2560).lr)


def test_what_is_given_counts_for_the_rest() -> None:
    planned = plan_schedule(100, 1, 2560, Given(batch_size=10, epochs=2))
    assert (planned.steps_per_epoch, planned.steps) == (10, 20)


def test_micro_batches_divide_a_step() -> None:
    assert micro_batch_sizes(24, 2) == [12, 6, 4, 3, 2, 1]


def test_the_recipe_by_hand_is_what_the_verb_would_write() -> None:
    """If this fails, run `python -m tinygptv_ds.finetune.by_hand` and commit the result."""
    assert (ROOT / "stages/finetune.yaml").read_text() == by_hand.text()


def test_the_learning_rate_rises_once_and_falls(published: Recipe) -> None:
    recipe = composed(published)
    rates = [learning_rate_of_step(step, recipe) for step in range(recipe.train.total_steps)]
    top = rates.index(max(rates))
    assert max(rates) == recipe.optimizer.lr and top == recipe.optimizer.warmup_steps
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_every_change_is_taken_and_said(published: Recipe) -> None:
    made = compose(
        stage=4,
        model=published.model,
        text=published.text,
        width=2560,
        data=Data("data/train", "data/held_out", 27, 3),
        devices=CPU,
        title="A title.",
        overrides=["train.batch_size=9", "train.epochs=2", "model.lora_r=8", "optimizer.lr=3e-4"],
    )
    assert (made.recipe.train.batch_size, made.recipe.train.steps_per_epoch, made.recipe.train.epochs) == (9, 3, 2)
    assert (made.recipe.model.lora_r, made.recipe.optimizer.lr) == (8, 3e-4)
    assert "  lora_r: 8  # given with --set\n" in made.text
    assert yaml.safe_load(made.text)["train"]["epochs"] == 2


@pytest.mark.parametrize("change", ["train.max_tokens=512", "train.micro_batch_size=2"])
def test_a_micro_batch_of_ones_own(published: Recipe, change: str) -> None:
    changes = [change, *(["train.micro_batch_size=null"] if "max_tokens" in change else [])]
    train = composed(published, *changes).train
    assert (train.micro_batch_size, train.max_tokens) == ((None, 512) if "max_tokens" in change else (2, None))


def test_an_unknown_key_is_named(published: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"unknown key train\.epoch; did you mean epochs"):
        composed(published, "train.epoch=3")


def test_captions_are_asked_for(published: Recipe) -> None:
    recipe = composed(published, kind="caption", captions=True)
    assert (recipe.text.prompts, recipe.evaluation.benchmarks[0].kind) == ("stage3", "caption")


@pytest.mark.parametrize(
    ("gib", "ranks", "file", "recomputed"),
    [
        (80, 1, "zero2_bf16.json", False),
        (24, 1, "zero2_bf16.json", False),
        (12, 1, "zero2_bf16.json", True),
        (16, 1, "zero2_bf16.json", False),
        (8, 1, "zero2_bf16.json", True),
        (8, 4, "zero3_bf16.json", True),
    ],
)
def test_what_fits(published: Recipe, gib: float, ranks: int, file: str, recomputed: bool) -> None:
    recipe = composed(published, devices=replace(CPU, ranks=ranks), samples=900)
    found = fit(recipe, Devices(ranks, gib, "a GPU"))
    assert (found.deepspeed, found.gradient_checkpointing) == (file, recomputed)
    smaller = fit(recipe, Devices(ranks, gib + 40, "a GPU"))
    assert smaller.micro_batch_size >= found.micro_batch_size


def test_frozen_bits_are_the_last_but_one_resort(published: Recipe) -> None:
    """As few as needed, on one card; where bitsandbytes is not installed, weights go to CPU memory instead."""
    recipe = composed(published, samples=900)
    found = {gib: fit(recipe, Devices(1, gib, "a GPU")) for gib in (6, 8, 12)}
    assert [(f.frozen_bits, f.quantize_vision) for f in found.values()] == [(4, True), (4, False), (None, False)]
    without = fit(recipe, Devices(1, 8, "a GPU", quantizes=False))
    assert (without.deepspeed, without.frozen_bits) == ("zero3_offload.json", None)
    whole = replace(recipe, model=replace(recipe.model, train=["projections", "norms", "llm"]))
    assert fit(whole, Devices(1, 24, "a GPU")).frozen_bits is None
    small = composed(published, devices=Devices(1, 8, "a GPU"), samples=900)
    assert (small.model.frozen_bits, small.model.gradient_checkpointing) == (4, True)


def test_bits_of_ones_own(published: Recipe) -> None:
    null = composed(published, "model.frozen_bits=null", devices=Devices(1, 8, "a GPU"), samples=900)
    assert null.model.frozen_bits is None
    eight = composed(published, "model.frozen_bits=8", devices=Devices(1, 80, "a GPU"), samples=900)
    assert eight.model.frozen_bits == 8


def test_older_cards_compute_in_fp16(published: Recipe) -> None:
    recipe = composed(published, samples=900)
    assert fit(recipe, Devices(1, 16, "V100", bf16=False)).deepspeed == "zero2_fp16.json"


def test_nothing_fits_into_two_gib(published: Recipe) -> None:
    with pytest.raises(ConfigError, match="does not fit on 1 x a GPU"):
        fit(composed(published), Devices(1, 1, "a GPU"))


def test_data_are_recognized(tmp_path: Path) -> None:
    items = [{"image": "a.jpg", "conversations": []}] * 3
    (tmp_path / "mine").write_text("\ufeff " + json.dumps(items))
    (tmp_path / "lines.json").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "table.tsv").write_text("file_name\tcaption\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("a caption")
    (tmp_path / "both").mkdir()
    (tmp_path / "both/mine.json").write_text("[]")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/00000.tar").write_bytes(b"")
    names = ("mine", "lines.json", "table.tsv", "folder", "both", "tars")
    forms = [source_of(tmp_path / name, None, None).format for name in names]
    assert forms == ["llava", "llava", "llava", "caption-folder", "llava", "shards"]
    assert source_of(tmp_path / "mine", None, "jsonl").format == "jsonl"
    assert source_of(tmp_path / "mine", tmp_path / "folder", None).options[-1] == str(tmp_path / "folder")
    assert source_of(tmp_path / "mine", None, None, ["q=question"]).options[-2:] == ("--columns", "q=question")
    assert [source_of(tmp_path / name, None).entries for name in ("mine", "lines.json", "both")] == [3, 3, None]


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [(None, None, "no such file or folder"), ("[]", "absent", "no such folder"), ("", None, "is empty")],
)
def test_wrong_data_are_reported(tmp_path: Path, content: str | None, images: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(DataError, match=message):
        source_of(tmp_path / "mine.json", tmp_path / images if images else None, None)
