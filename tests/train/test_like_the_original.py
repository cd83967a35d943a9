"""Deviations from the original: the default and the original's behavior, side by side."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe, load_recipe
from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.models.loss import PackedOutput
from tinygptv_ds.processing.sequence import ImageTokens, build_sequence
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG, Rendered, load_prompts
from tinygptv_ds.train.recipe_warnings import recipe_warnings
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.step import micro_step

STAGES = Path(__file__).parents[2] / "stages"
RAW = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("overrides", [[], ["model.lora_r=64"]])
def test_stage_1_is_without_lora_or_as_its_code_was(overrides: list[str]) -> None:
    """Without LoRA, 13,809,664 values are trained, with it 45,266,944 (a test of the model counts both)."""
    recipe = load_recipe(STAGES / "stage1.yaml", overrides)
    assert recipe.model.lora_r == (64 if overrides else 0)
    assert "if job.recipe.model.lora_r " in (STAGES / "stage1.py").read_text()


@pytest.mark.parametrize("reduction", ["step_mean", "micro_batch_mean"])
def test_the_loss_of_a_step(reduction: str) -> None:
    """Over all ranks and micro-batches, either each token has the same weight or each micro-batch."""
    tokens = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5.0]), torch.tensor([]), torch.tensor([4.0, 0.0])]
    ranks, losses, boundaries = 2, [], []
    engine = SimpleNamespace(
        ranks=SimpleNamespace(world_size=ranks),
        backward=losses.append,
        step=lambda: None,
        set_boundary=boundaries.append,
    )
    run = Run(SimpleNamespace(), engine, SimpleNamespace(enter=lambda phase: None))
    divisor = torch.tensor(6.0) if reduction == "step_mean" else None
    for place, each in enumerate(tokens):
        engine.forward = lambda _, each=each: PackedOutput(each, torch.zeros(()))
        micro_step(run, {}, divisor, number=place % 2, count=2)
    assert boundaries == [False, True] * 2
    step = sum(losses) / ranks
    assert step == pytest.approx({"step_mean": 18 / 6, "micro_batch_mean": (3 + 5 + 0 + 2) / 4}[reduction])


def prompts_by_step(raw: dict[str, Any], tmp_path: Path) -> list[set[tuple[int, ...]]]:
    """Return what precedes the answers of each step, including BOS token and image."""
    recipe = build_recipe(raw, "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    tokens = Tokens(tokenizer, recipe.text, ImageTokens(len(tokenizer) + 4, tiny.QUERIES), tiny.IMAGE_SIZE)
    dataset = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)
    found = []
    for number in range(12):
        batch = dataset[number, 0].batch
        ends = torch.searchsorted(batch.target_rows, batch.cu_seqlens[:-1])  # the first target of each sample
        firsts = batch.target_rows[ends] + 1
        rows = zip(batch.cu_seqlens[:-1].tolist(), firsts.tolist(), strict=True)
        found.append({tuple(batch.input_ids[start:end].tolist()) for start, end in rows})
    return found


@pytest.mark.parametrize("per", ["sample", "step"])
def test_the_prompt_of_stage_3(raw_recipe: RAW, tmp_path: Path, per: str) -> None:
    captions = tiny.write_shards(tmp_path / "caption", tiny.samples("caption", 12))
    raw = raw_recipe(
        text={"prompts": "stage3", "prompt_template": "###Human: {} ###Assistant: ", "prompt_per": per},
        data={"datasets": [{"name": "caption", "shards": str(captions)}], "num_workers": 0},
        train__batch_size=8,
        train__micro_batch_size=8,
    )
    steps = prompts_by_step(raw, tmp_path)
    assert set().union(*steps) == set(prompts_of(raw)), "all four are drawn"
    assert all(len(step) == 1 for step in steps) is (per == "step")
    assert len(set(map(frozenset, steps))) > 1
    assert steps == prompts_by_step(raw, tmp_path)


def prompts_of(raw: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the published prompts (MiniGPT-4's prompts/alignment.txt) in stage 3's template, as tokens."""
    recipe = build_recipe(raw, "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    image = ImageTokens(len(tokenizer) + 4, tiny.QUERIES)
    text = TextSection(end_sym="")
    rows = [
        build_sequence(Rendered(((f"###Human: {prompt} ###Assistant: ", ""),)), 1, tokenizer, text, image, lambda _: 0)
        for prompt in load_prompts()["stage3"]
    ]
    return [tuple(row.input_ids.tolist()) for row in rows]


def test_the_prompts_of_stage_3_are_the_published_ones() -> None:
    assert list(load_prompts()["stage3"]) == [
        f"{IMAGE_TAG} Describe this image in detail.",
        f"{IMAGE_TAG} Take a look at this image and describe what you notice.",
        f"{IMAGE_TAG} Please provide a detailed description of the picture.",  # codespell:ignore picture
        f"{IMAGE_TAG} Could you describe the contents of this image for me?",
    ]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_datasets_are_mixed_by_sample_or_by_step(raw_recipe: RAW, homogeneous: bool) -> None:
    stream = open_stream(build_recipe(raw_recipe(data__homogeneous=homogeneous), "test"))
    steps = [{ref.dataset for ref in stream.order.step(step)} for step in range(8)]
    assert all(len(datasets) == 1 for datasets in steps) is homogeneous
    assert set().union(*steps) == set(stream.names)


@pytest.mark.parametrize(("min_lr", "warned"), [("8.0e-5", True), ("1.0e-6", False)])
def test_stage_4_rises_as_published_and_says_so(min_lr: str, warned: bool) -> None:
    recipe = load_recipe(STAGES / "stage4.yaml", [f"optimizer.min_lr={min_lr}"])
    assert (recipe.optimizer.lr, load_recipe(STAGES / "stage4.yaml").optimizer.min_lr) == (1e-5, 8e-5)
    assert ["rises from 1e-05 towards 8e-05" in warning for warning in recipe_warnings(recipe)] == [True] * warned


def test_inputs_on_which_the_original_raises(weights: Path) -> None:
    """Images at either end of a prompt and turns without a template give ordinary rows."""
    tokenizer = AutoTokenizer.from_pretrained(weights / "phi")
    image = ImageTokens(len(tokenizer) + 4, tiny.QUERIES)
    for prompt in (IMAGE_PLACEHOLDER, f"{IMAGE_PLACEHOLDER} what ?", f"what ? {IMAGE_PLACEHOLDER}"):
        row = build_sequence(Rendered(((prompt, "a"),)), 1, tokenizer, TextSection(), image, lambda _: 0)
        assert (row.input_ids == image.token_id).sum() == tiny.QUERIES
    turns = Rendered(((f"{IMAGE_PLACEHOLDER} what ?", "a"), ("where ?", "b")))
    row = build_sequence(turns, 1, tokenizer, TextSection(prompt_template=None), image, lambda _: 0)
    assert (row.labels != -100).sum() > 0
    # A template but no instruction: the image alone is the prompt.
    bare = build_sequence(
        Rendered(((None, "a"),)), 1, tokenizer, TextSection(prompt_template="[INST] {} [/INST]"), image, lambda _: 0
    )
    assert (bare.input_ids[1 : 1 + tiny.QUERIES] == image.token_id).all()
