"""The same recipe gives the same run on one rank, on two under ZeRO-2 and ZeRO-3, resumed, and from features."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended
from helpers.launcher import ROOT, ZERO_3, images_of_each_rank
from helpers.verbs import call
from helpers.written import Written
from safetensors.torch import load_file

from tinygptv_ds.features import compute as make_features

STEPS = int(os.environ.get("STEPS_OF_SAME_LOSSES", 8))  # the table in docs/train/resume.md has 30
HALF = STEPS // 2
NUMBERS = ["train/loss", "train/grad_norm", "train/lr"] + [f"train/loss_{name}" for name in ("text", "vqa", "pair")]
EXACT = {"rel": 1e-5, "abs": 0}
ROUNDED = {"rel": 0, "abs": 0.02}  # bf16


class Place(NamedTuple):
    """Where the runs of this module are, and their one recipe."""

    folder: Path
    recipe: Path


@pytest.fixture(scope="module")
def place(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("same")
    raw = tiny.recipe(
        weights,
        shards,
        train__steps_per_epoch=STEPS,
        train__checkpoint_every=HALF,
        model__resid_dropout=0.1,
        model__lora_dropout=0.05,
    )
    raw["data"]["datasets"][1]["weight"] = 20  # text: micro-batches without an image are common, steps are not rare
    return Place(folder, tiny.write_recipe(folder / "recipe.yaml", raw))


@pytest.fixture(scope="module")
def one_rank(place: Place) -> Ranks:
    return ended(place.recipe, place.folder / "one")


@pytest.fixture(scope="module")
def zero_2(place: Place) -> Ranks:
    return ended(place.recipe, place.folder / "zero2", ranks=2)


@pytest.fixture(scope="module")
def zero_3(place: Place) -> Ranks:
    return ended(place.recipe, place.folder / "zero3", ZERO_3, ranks=2)


def same(ours: Written, theirs: Written, first: int = 0, **tolerance: float) -> None:
    """Compare losses, gradient norms and learning rates of every step, and the trained weights at the end."""
    assert len(ours.metrics) == STEPS - first
    for mine, other in zip(ours.metrics, theirs.metrics[first:], strict=True):
        assert mine.keys() == other.keys()
        for name in set(NUMBERS) & mine.keys():
            loose = 1e-4 if name == "train/grad_norm" else tolerance["rel"]
            assert mine[name] == pytest.approx(other[name], **{**tolerance, "rel": loose}), (mine["step"], name)
    mine, other = (load_file(each.folder / "model/trained.safetensors") for each in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        # AdamW makes full steps even of gradients that are rounding errors.
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def test_some_micro_batch_has_no_image_on_one_rank_alone(place: Place) -> None:
    """Over such a micro-batch ZeRO-2 would fail and ZeRO-3 hang, if the ranks' calls differed."""
    counts = images_of_each_rank(place.recipe, ranks=2)
    assert any(min(ranks) == 0 < max(ranks) for ranks in counts)
    assert any(max(ranks) == 0 for ranks in counts)
    # Nor has a whole step, before the checkpoint and after it: the optimizer counts it for Phi alone.
    steps = [counts[first : first + len(counts) // STEPS] for first in range(0, len(counts), len(counts) // STEPS)]
    without = [number for number, step in enumerate(steps) if not any(map(max, step))]
    assert len(steps) == STEPS and min(without) < HALF <= max(without)


def test_two_ranks_zero_2(one_rank: Ranks, zero_2: Ranks) -> None:
    same(zero_2, one_rank, **EXACT)
    assert len(set(one_rank.column("train/loss"))) == STEPS


def test_two_ranks_zero_3(one_rank: Ranks, zero_3: Ranks) -> None:
    same(zero_3, one_rank, **EXACT)


def test_bf16(place: Place, one_rank: Ranks) -> None:
    """ZeRO-2 on one rank and ZeRO-3 on two, with the ready JSONs, are close to fp32 and closer to each other."""
    two, three = (
        ended(
            place.recipe,
            place.folder / f"bf16_{n}",
            f"--deepspeed_config={ROOT}/ds_configs/zero{n}_bf16.json",
            ranks=n - 1,
        )
        for n in (2, 3)
    )
    assert two.column("train/loss") == pytest.approx(one_rank.column("train/loss"), **ROUNDED)
    assert two.column("train/loss") != one_rank.column("train/loss")  # it is another precision
    assert three.column("train/loss") == pytest.approx(two.column("train/loss"), rel=0, abs=0.005)


def test_packed_by_tokens(place: Place, one_rank: Ranks) -> None:
    """Micro-batches by length change in number from step to step, and the step stays the same."""
    options = ["--set=train.micro_batch_size=null", "--set=train.max_tokens=140"]
    packed = ended(place.recipe, place.folder / "tokens", ZERO_3, *options, ranks=2)
    same(packed, one_rank, **EXACT)


@pytest.fixture(scope="module")
def features(place: Place) -> str:
    """Make the outputs of ViT and Q-Former for this recipe; return the option with which a stage uses them."""
    out = place.folder / "features"
    call(make_features, place.recipe, "--out", out, "--workers", 0, "--batch-size", 7)
    return f"--set=data.features={out}"


def equal(ours: Written, theirs: Written) -> None:
    """Compare every loss and every trained weight, bit for bit."""
    metrics = [
        [{k: v for k, v in line.items() if k.startswith("train/")} for line in r.metrics] for r in (ours, theirs)
    ]
    assert len(metrics[0]) == STEPS and metrics[0] == metrics[1]
    files = [each.folder / "model/trained.safetensors" for each in (ours, theirs)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_from_features_two_ranks_zero_2(place: Place, zero_2: Ranks, features: str) -> None:
    equal(ended(place.recipe, place.folder / "features2", features, ranks=2), zero_2)


def test_from_features_two_ranks_zero_3(place: Place, zero_3: Ranks, features: str) -> None:
    """No rank runs the ViT, not even one without an image, and the panel of answers sees features, too."""
    done = ended(place.recipe, place.folder / "features3", ZERO_3, features, ranks=2)
    equal(done, zero_3)
    shown = rf"(sample \d at step {STEPS}: .*)"
    samples = [re.findall(shown, (each.folder / "log.txt").read_text()) for each in (done, zero_3)]
    assert len(samples[0]) == 2 and samples[0] == samples[1]


def resumed(place: Place, stopped: Ranks, name: str, *options: str, ranks: int) -> Ranks:
    """Go on from the checkpoint that `stopped` made after half of the steps, as if it had been killed after it."""
    folder, half = place.folder / name, f"step-{HALF:08d}"
    shutil.copytree(stopped.folder / "checkpoints" / half, folder / "checkpoints" / half)
    return ended(place.recipe, folder, *options, ranks=ranks)


def test_resumed_under_another_zero_stage(place: Place, zero_2: Ranks) -> None:
    """A run that was saved under ZeRO-2 after half of the steps resumes under ZeRO-3."""
    again = resumed(place, zero_2, "resumed3", ZERO_3, ranks=2)
    assert "resuming from" in (again.folder / "log.txt").read_text()
    same(again, zero_2, first=HALF, **EXACT)


def test_resumed_on_another_number_of_ranks(place: Place, zero_3: Ranks) -> None:
    """A run that two ranks saved under ZeRO-3 resumes on one under ZeRO-2."""
    same(resumed(place, zero_3, "resumed1", ranks=1), zero_3, first=HALF, **EXACT)
