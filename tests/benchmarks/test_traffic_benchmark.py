"""Counted bytes are those that real ranks reduce and gather; the formulas of `estimate` follow the counts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import ended

from benchmarks import collectives
from benchmarks.made_up import SIZES
from benchmarks.model_layers import model_layers, weights_of, without_vision
from benchmarks.traffic import FINE, counted_payload, key, measured_payload, zero_of
from benchmarks.traffic_counts import (
    GATHERED,
    GRADIENTS,
    OFFLOAD,
    UPDATED,
    Collective,
    Step,
    Zero,
    checkpoint_traffic,
    moved_over_pcie,
    step_of,
    step_traffic,
)
from benchmarks.zero3_gathers import Limits, count_gathers
from tinygptv_ds.config.deepspeed import load_deepspeed_json, resolve_deepspeed
from tinygptv_ds.config.load import build_recipe, load_recipe
from tinygptv_ds.data.stream.plan import Planner, open_stream
from tinygptv_ds.estimate.communication import StepVolume, step_volume, zero_1, zero_2, zero_3
from tinygptv_ds.estimate.model_size import parameter_counts, parameter_shapes
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import part_of
from tinygptv_ds.weights.assemble import meta_model, model_config

ROOT = Path(__file__).parents[2]
ALL = ("projections", "norms", "lora")
STEPS, SETTLED = 3, 2  # after two steps ZeRO-3 knows the order in which weights are used
PUBLISHED = TinyGPTVConfig(lora_r=64)


@pytest.fixture
def unlike(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A recipe whose two ranks begin with unlike micro-batches, one with an image and one without."""
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
    file, recorded = ROOT / f"ds_configs/{json_file}.json", tmp_path / "recorded.json"
    options = [part for change in changes for part in ("--set", change)]
    ended(
        unlike,
        tmp_path / "run",
        "--deepspeed_config",
        str(file),
        *options,
        ranks=2,
        fault=collectives.note,
        file=recorded,
    )
    recipe = load_recipe(unlike, list(changes))
    step = step_of(recipe, model_config(recipe.model, recipe.text), 2)
    zero = zero_of(resolve_deepspeed(load_deepspeed_json(file), recipe, 2, json_file))
    saved = checkpoint_traffic(step, zero)
    expected = counted_payload(step_traffic(step, zero))
    measured = measured_payload(json.loads(recorded.read_text()), SETTLED)
    assert measured.pop(key(saved.what, saved.kind, 2)) == saved.payload
    assert measured == expected


def test_the_list_is_the_model() -> None:
    """Every parameter is listed under its name, with its part, size and dimensions."""
    config = SIZES["tiny"]
    built = {name: (part_of(name), p.numel(), p.dim()) for name, p in meta_model(config).named_parameters()}
    assert {w.name: (w.part, w.numel, w.dimensions) for w in weights_of(model_layers(config))} == built


def test_the_defaults_are_those_of_the_jsons(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    recipe = build_recipe(raw_recipe(), "test")
    for name, zero in (
        ("zero1_bf16", Zero(1)),
        ("zero2_bf16", Zero(2)),
        ("zero2_fp16", Zero(2)),
        ("zero3_bf16", Zero(3)),
        ("zero3_fp16", Zero(3)),
        ("zero3_offload", OFFLOAD),
        ("cpu", Zero(2, 4, 4)),
    ):
        config = load_deepspeed_json(ROOT / f"ds_configs/{name}.json")
        assert zero_of(resolve_deepspeed(config, recipe, 2, name)) == zero, name


def of(collectives: list[Collective], what: str) -> dict[int, int]:
    """Payload by the number of ranks that take part."""
    return {each.ranks: each.payload for each in collectives if each.what == what}


def test_the_published_sizes() -> None:
    """45.3 M trained parameters in fp32; 3.9 B frozen ones in bf16, of which Phi's are needed forward and backward."""
    step = Step(model_layers(PUBLISHED), ALL, 64, micro_batches=2)
    two, three = step_traffic(step, Zero(2)), step_traffic(step, Zero(3))
    assert of(two, GRADIENTS) == {64: 2 * 4 * 45_266_944}
    assert of(two, UPDATED)[64] == pytest.approx(4 * 45_266_944, rel=1e-4)
    assert sum(each.sent for each in two) == pytest.approx(63 / 64 * 4 * 45_266_944 * (2 * 2 + 1), rel=1e-4)
    once_forward, again_backward = 2 * 3.87e9 + 4 * 45.3e6, 2 * (2.78e9 - 2 * 131e6) + 4 * 45.3e6
    gathered = of(three, GATHERED)[64] / 2
    assert once_forward + 0.85 * again_backward < gathered < once_forward + again_backward
    assert of(step_traffic(replace(step, from_features=True), Zero(3)), GATHERED)[64] / 2 == pytest.approx(
        gathered - 2 * (985_897_344 + 105_162_240), rel=0.001
    )
    recomputing = step_traffic(replace(step, checkpoint_every=1), Zero(3))
    assert of(recomputing, GATHERED)[64] / 2 - gathered == pytest.approx(2 * 32 * 78.6e6, rel=0.05)


def test_copies_in_each_node() -> None:
    """Only what is trained crosses nodes, once a step however many micro-batches there are."""
    step = Step(model_layers(PUBLISHED), ALL, 64, micro_batches=2)
    whole = of(step_traffic(step, Zero(3)), GATHERED)
    divided = of(step_traffic(step, Zero(3, node=8)), GATHERED)
    assert divided[64] == pytest.approx(4 * 45_266_944, rel=0.01)
    assert divided[64] + divided[8] == whole[64]


def test_a_weight_that_is_used_again_soon_is_kept() -> None:
    root = model_layers(PUBLISHED)
    most = count_gathers(root, ALL, Limits(persistence=0, reuse=0, prefetch=0))
    once = count_gathers(root, ALL, Limits(persistence=0, reuse=10**11, prefetch=0))
    assert set(once.values()) == {1} and once.keys() == most.keys()
    assert most["language_model.lm_head.weight"] == most["llama_proj2.weight"] == 2
    assert most["visual_encoder.blocks.0.mlp.fc1.weight"] == most["language_model.model.embed_tokens.weight"] == 1
    assert count_gathers(root, (*ALL, "llm"), Limits(0, 0, 0))["language_model.model.embed_tokens.weight"] == 2
    assert count_gathers(root, (*ALL, "vit"), Limits(0, 0, 0))["visual_encoder.blocks.0.mlp.fc1.weight"] == 2
    assert not any(
        name.startswith(("visual", "qformer", "query")) for name in count_gathers(without_vision(root), ALL, Limits())
    )


@pytest.mark.parametrize(
    ("trained", "changes"),
    [
        (ALL, {}),
        (("projections", "norms"), {}),
        (ALL, {"checkpoint_every": 1}),
        (ALL, {"checkpoint_every": 2, "micro_batches": 4}),
        (ALL, {"from_features": True}),
        ((*ALL, "llm"), {}),
        ((*ALL, "qformer"), {}),
        ((*ALL, "vit"), {}),
    ],
)
def test_the_formulas_of_estimate_follow_the_counts(trained: tuple[str, ...], changes: dict[str, Any]) -> None:
    """Within 1 % for each ZeRO stage and offload, and with hpZ inside a node; within 4 % between nodes with hpZ."""
    step = Step(model_layers(PUBLISHED), trained, 64, **changes)
    every = step.checkpoint_every
    volume = step_volume(
        PUBLISHED,
        parameter_counts(parameter_shapes(PUBLISHED)),
        trained,
        ranks=64,
        micro_batches=step.micro_batches,
        recomputed=1 / every if every else 0.0,
        from_features=step.from_features,
    )
    for zero, sent in (
        (Zero(1), zero_1(volume)),
        (Zero(2), zero_2(volume)),
        (Zero(3), zero_3(volume)),
        (OFFLOAD, zero_3(volume, offloaded=True)),
    ):
        collectives = step_traffic(step, zero)
        assert sent.across == pytest.approx(sum(each.sent for each in collectives), rel=0.01), zero
        assert sent.checkpoint == pytest.approx(checkpoint_traffic(step, zero).sent, rel=0.01)
        assert sent.pcie == pytest.approx(moved_over_pcie(collectives) if zero.offloaded else 0.0, rel=0.01)
    hpz, collectives = zero_3(volume, node=8), step_traffic(step, Zero(3, node=8))
    assert hpz.inside == pytest.approx(sum(each.sent for each in collectives if each.ranks == 8), rel=0.01)
    assert hpz.across == pytest.approx(sum(each.sent for each in collectives if each.ranks == 64), rel=0.04)


def test_the_formulas_for_one_rank() -> None:
    volume = StepVolume(ranks=1, micro_batches=2, trained=8.0, forward=100.0, backward=80.0)
    assert all(sent.across == sent.inside == 0 for sent in (zero_1(volume), zero_2(volume), zero_3(volume)))


def test_one_rank_sends_nothing() -> None:
    step = Step(model_layers(TinyGPTVConfig()), ("projections",), 1)
    assert all(each.sent == 0 for number in (1, 2, 3) for each in step_traffic(step, Zero(number)))
    assert checkpoint_traffic(step, Zero(2)).sent == 0
    assert moved_over_pcie(step_traffic(step, OFFLOAD)) > 2 * 3.8e9  # each weight from CPU memory at least once
