"""Training other parts than the published ones: trainable parts, precision, learning rate, and what is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.models.parameters import (
    PARTS,
    frozen_trainables,
    lora,
    norms,
    projections,
    train_only,
    vision,
    weight_decay_groups,
)
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.transfer import model_inputs
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.resolve import resolve
from tinygptv_ds.weights.trained import save_trained

RawRecipe = Callable[..., dict[str, Any]]
ALL = list(PARTS)


@pytest.fixture
def built(raw_recipe: RawRecipe) -> Callable[..., tuple[Recipe, TinyGPTVForConditionalGeneration]]:
    def build(*parts: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Recipe, Any]:
        recipe = build_recipe(raw_recipe(**{"model__train": list(parts), **changes}), "r")
        torch.manual_seed(0)
        model = build_model(recipe.model, recipe.text, frozen_dtype=dtype)
        train_only(model, projections, norms, lora, override=recipe.model.train)
        return recipe, model

    return build


def inputs(recipe: Recipe, model: TinyGPTVForConditionalGeneration) -> dict[str, Any]:
    """Return the first micro-batch."""
    batches = MicroBatches(open_stream(recipe), open_tokens(recipe, model.config), rank=0, world_size=1)
    return model_inputs(batches[0, 0].batch)


@pytest.mark.parametrize("part", ALL)
def test_each_part_alone_learns_in_fp32(part: str, built: Callable[..., Any]) -> None:
    _, model = built(part, dtype=torch.bfloat16)
    named = dict(model.named_parameters())
    learning = {name for name, p in named.items() if p.requires_grad}
    assert learning == set(filter(PARTS[part], named)) != set()
    assert {named[name].dtype for name in learning} == {torch.float32}
    if part not in ("vit", "qformer"):
        assert {p.dtype for name, p in named.items() if vision(name)} == {torch.bfloat16}


def test_the_parts_are_the_whole_model(built: Callable[..., Any]) -> None:
    _, model = built(*ALL)
    assert all(p.requires_grad for p in model.parameters())


def test_rates_by_part(built: Callable[..., Any]) -> None:
    """A parameter in several parts has the factor of the first: norms do not take that of the whole Phi."""
    _, model = built(*ALL)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = weight_decay_groups(model, 0.05, {"qformer": 0.1, "llm": 0.5})
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [
        (1.0, 0.05),
        (1.0, 0.0),
        (0.5, 0.05),
        (0.5, 0.0),
        (1.0, 0.05),
        (1.0, 0.0),
        (0.1, 0.05),
        (0.1, 0.0),
    ]
    assert [g["needs_images"] for g in groups] == [False] * 4 + [True] * 4
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert sum(map(len, members)) == len(names)
    assert members[6] | members[7] == set(filter(PARTS["qformer"], names.values()))
    assert members[2] | members[3] == {n for n in names.values() if PARTS["llm"](n) and not norms(n)}


def test_text_alone_gives_every_part_a_gradient_of_zero(built: Callable[..., Any]) -> None:
    """Without these gradients, ZeRO-2 fails and ZeRO-3 hangs if another rank has an image."""
    recipe, model = built("projections", "norms", "lora", "qformer", "vit", data__only=["text"])
    model.always_run_vision = True
    output = model.train()(**inputs(recipe, model))
    (output.token_losses.sum() + output.anchor).backward()
    looking = {n: p for n, p in model.named_parameters() if p.requires_grad and (projections(n) or vision(n))}
    without = [name for name, p in looking.items() if p.grad is None]
    assert looking and not without
    assert all(not p.grad.any() for p in looking.values())
    assert any(p.grad.any() for name, p in model.named_parameters() if norms(name))


@pytest.mark.parametrize(("every", "recomputed"), [(True, 2), (1, 2), (2, 1), (5, 1), (False, 0)])
def test_recomputed_blocks(every: bool | int, recomputed: int, built: Callable[..., Any]) -> None:
    """Every N-th block runs a second time; loss and gradients are the same bit for bit."""
    results = []
    for setting in (False, every):
        recipe, model = built("projections", "norms", "lora", model__gradient_checkpointing=setting)
        runs: list[int] = []
        for layer in model.language_model.model.layers:
            layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss = model.train()(**inputs(recipe, model)).token_losses.sum()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.requires_grad], len(runs)))
    (plain, gradients, once), (loss, again, twice) = results
    assert torch.equal(plain, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert twice - once == recomputed


@pytest.mark.parametrize(("part", "recomputed"), [("vit", 1), ("qformer", 0)])
def test_recomputed_blocks_of_the_vit(part: str, recomputed: int, built: Callable[..., Any]) -> None:
    """Each of them runs a second time, where it is trained; loss and gradients are the same bit for bit."""
    results = []
    for setting in (False, 2):
        recipe, model = built("projections", part, model__gradient_checkpointing=setting)
        runs: list[int] = []
        for block in model.visual_encoder.blocks:
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss = model.train()(**inputs(recipe, model)).token_losses.sum()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.requires_grad], len(runs)))
        with torch.no_grad():  # e.g. a validation
            model(**inputs(recipe, model))
        assert len(runs) == results[-1][2] + len(model.visual_encoder.blocks)
    (plain, gradients, once), (loss, again, twice) = results
    assert torch.equal(plain, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert twice - once == recomputed * len(model.visual_encoder.blocks)


def test_the_result_holds_all_that_is_trained_and_goes_on(built: Callable[..., Any], tmp_path: Path) -> None:
    """The first run trains everything; the second starts from its result and trains only the projections."""
    recipe, model = built(*ALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_trained(values, model.config, tmp_path / "first/model", provenance_of(recipe))
    found = resolve(tmp_path / "first").weights()
    assert [n for n, value in values.items() if not torch.equal(found[n].read(), value)] == []

    recipe, model = built("projections", model__init_from=str(tmp_path / "first"))
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    model.frozen_updates |= frozen_trainables(model)  # as the session does
    trained = {name: p.detach() * 2 for name, p in model.named_parameters() if p.requires_grad}
    save_trained(model.frozen_updates | trained, model.config, tmp_path / "second/model", provenance_of(recipe))
    found = resolve(tmp_path / "second").weights()
    for name, value in values.items():
        assert torch.equal(found[name].read(), 2 * value if projections(name) else value), name
