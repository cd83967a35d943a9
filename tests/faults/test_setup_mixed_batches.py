"""Twenty steps of text and images on ranks that have now one, now the other, with fewer shards than loaders.

All at once: ZeRO-2 and ZeRO-3 with CPU offload, a Q-Former that learns at a rate of its own, recomputed blocks, and two
cycles, of which the second is resumed in its middle.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended
from helpers.launcher import ROOT, images_of_each_rank
from safetensors.torch import load_file

STEPS, CYCLE, SAVED = 20, 10, 11
EXACT = {"rel": 1e-5, "abs": 0}


class Place(NamedTuple):
    """Where the runs of this module are, and their one recipe."""

    folder: Path
    recipe: Path


@pytest.fixture(scope="module")
def place(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("mixed")
    shards = {
        kind: tiny.write_shards(folder / kind, tiny.samples(kind, 12), samples_per_shard=12)
        for kind in ("vqa", "text", "pair")
    }
    raw = tiny.recipe(weights, shards, train__steps_per_epoch=CYCLE, train__cycles=2, train__checkpoint_every=SAVED)
    raw["data"] |= {"num_workers": 2}
    raw["data"]["datasets"][1]["weight"] = 5
    raw["model"] |= {"train": ["projections", "norms", "lora", "qformer"], "gradient_checkpointing": 2}
    raw["optimizer"] |= {"schedule": "wsd", "decay_steps": 3, "lr_scale": {"qformer": 0.1}}
    raw["train"] |= {"batch_size": 4, "sample_count": 0}
    return Place(folder, tiny.write_recipe(folder / "recipe.yaml", raw))


@pytest.fixture(scope="module")
def zero_2(place: Place) -> Ranks:
    return ended(place.recipe, place.folder / "zero2", ranks=2)


def test_the_ranks_have_unlike_batches(place: Place) -> None:
    """Two ranks share one shard a dataset, and micro-batches lack images on one rank, on the other, or on both."""
    empty = {tuple(count == 0 for count in ranks) for ranks in images_of_each_rank(place.recipe, ranks=2)}
    assert {(True, True), (True, False)} <= empty or {(True, True), (False, True)} <= empty
    assert all(len(list((place.folder / kind).glob("*.tar"))) == 1 for kind in ("vqa", "text", "pair"))


def test_twenty_steps_under_zero_2(zero_2: Ranks) -> None:
    assert len(zero_2.metrics) == STEPS
    assert len(set(zero_2.column("train/loss"))) == STEPS
    rates = zero_2.column("train/lr")
    assert rates[:CYCLE] == rates[CYCLE:]  # each cycle has its warm-up
    assert rates[0] < rates[2] == rates[6] > rates[9]


def test_the_same_twenty_under_zero_3_with_offload(place: Place, zero_2: Ranks) -> None:
    """The ready JSON is used in fp32, so that the figures can be compared, and with every parameter divided."""
    options = ["--set=deepspeed.torch_autocast.enabled=false"]
    options += ["--set=deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}"]
    options.append(f"--deepspeed_config={ROOT}/ds_configs/zero3_offload.json")
    done = ended(place.recipe, place.folder / "zero3", *options, ranks=2)
    assert done.column("train/loss") == pytest.approx(zero_2.column("train/loss"), **EXACT)


def test_a_cycle_starts_with_a_fresh_optimizer(zero_2: Ranks) -> None:
    """After its first step exp_avg = 0.1 g and exp_avg_sq = 0.001 g^2, whatever the cycle before has left."""
    folder = zero_2.folder / f"checkpoints/step-{SAVED:08d}"
    tensors = load_file(folder / "state.safetensors")
    assert json.loads((folder / "state.json").read_text())["optimizer_steps"] == 1
    first = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("exp_avg/")}
    assert any("qformer" in name for name in first)
    for name, moment in first.items():
        second = tensors[name.replace("exp_avg/", "exp_avg_sq/")].double()
        torch.testing.assert_close(moment**2, 10 * second, rtol=1e-3, atol=1e-20)
    assert sum(float(moment.abs().sum()) for moment in first.values()) > 0


def test_resumed_in_the_middle_of_a_cycle(place: Place, zero_2: Ranks) -> None:
    """The run resumes bit for bit: the samples continue, and AdamW counts the steps of this cycle alone."""
    saved = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(zero_2.folder / saved, place.folder / "resumed" / saved)
    again = ended(place.recipe, place.folder / "resumed", ranks=2)
    assert again.column("step") == list(range(SAVED + 1, STEPS + 1))
    assert again.column("train/loss") == zero_2.column("train/loss")[SAVED:]


def test_the_q_former_is_trained_and_is_part_of_the_result(weights: Path, zero_2: Ranks) -> None:
    result = load_file(zero_2.folder / "model/trained.safetensors")
    before = torch.load(weights / "blip2_pretrained_flant5xxl.pth", weights_only=True)["model"]["query_tokens"]
    moved = (result["query_tokens"] - before).abs().max()
    assert 0 < moved < 0.1 * sum(zero_2.column("train/lr")) * 1.1  # AdamW moves by about the rate, here a tenth of it
