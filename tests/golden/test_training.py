"""Training step by step as the original trains: the same losses, learning rates, step counts and weights."""

import json
from pathlib import Path

import pytest
import torch
from helpers.forked import launched
from helpers.golden_model import read, tensors

from tinygptv_ds.models.parameters import needs_images
from tinygptv_ds.weights.layouts.tinygptv import canonical_name

LOSS = {"rel": 1e-5, "abs": 0}
WEIGHT = 1e-3  # a gradient that all but vanishes moves its weight by the sign of rounding at times
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
STAGES = {"ZeRO-2": {}, "ZeRO-3": {"zero_optimization": ZERO_3}}
SOME = 8  # steps under ZeRO-3, which takes its time on a CPU
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OTHERS = {
    "ZeRO-1 under autocast": {
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": {"stage": 1},
    },
    "ZeRO-2 in bf16": BF16 | {"zero_optimization": {"stage": 2}},
    "ZeRO-2 with offload": {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 2, **OFFLOAD}},
    "ZeRO-3 in bf16 with offload": BF16
    | {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {**ZERO_3, **OFFLOAD}},
}


def trained(folder: Path, out: Path, ranks: int, changes: dict[str, dict], first: int, last: int) -> None:
    """Train on some steps of a set, once with each change of DeepSpeed's JSON, and write into a folder for each."""
    for name in changes:
        (out / name).mkdir(parents=True)
    argv = [str(folder), str(out), json.dumps(changes), str(first), str(last)]
    with launched("tests/golden/train_as_recorded.py", argv, out, ranks=ranks) as run:
        assert run.end() == [0] * ranks, run.output


@pytest.mark.parametrize("stage", STAGES)
def test_set(golden: Path, training_set: str, stage: str, tmp_path: Path) -> None:
    """A recorded process is a rank here; step counts show that AdamW has passed over the projections without images."""
    folder = golden / "training" / training_set
    raw, expected, steps = (read(folder / f"{name}.json") for name in ("recipe", "expected", "steps"))
    ranks = raw.get("processes", 1)
    whole, steps = len(steps), steps if stage == "ZeRO-2" else steps[:SOME]
    trained(folder, tmp_path / "run", ranks, {stage: STAGES[stage]}, 0, len(steps) - 1)
    out = tmp_path / "run" / stage
    logs = [read(out / f"rank{rank}.json") for rank in range(ranks)]
    one_each = [[loss] for loss in expected["losses"]]
    by_step = [[loss for log in logs for loss in log["losses"][step]] for step in range(len(steps))]
    assert whole == raw["steps"] == len(expected["losses"]) == len(expected["lrs"])
    for step, losses in enumerate(by_step):
        assert losses == pytest.approx(expected.get("losses_by_process", one_each)[step], **LOSS), step
        assert sum(losses) / ranks == pytest.approx(expected["losses"][step], **LOSS), step
    assert logs[0]["lrs"] == pytest.approx(expected["lrs"][: len(steps)], rel=1e-12)
    assert logs[0]["kept"] == [True] * sum(not step["has_image"] for step in steps)
    if len(steps) < whole:
        return
    counts = {canonical_name(name): count for name, count in expected["optimizer_steps"].items()}
    assert counts == {name: logs[0]["optimizer_steps"][needs_images(name)] for name in counts}
    ours = tensors(out / "trained.safetensors")
    theirs = {canonical_name(name): weight for name, weight in tensors(folder / "trained.safetensors").items()}
    assert ours.keys() == theirs.keys() == counts.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=WEIGHT, msg=lambda text, n=name: f"{n}: {text}")


def test_steps_without_images_under_other_settings(golden: Path, tmp_path: Path) -> None:
    """Weights, moments and count of the projections stay bit for bit; the first step of all is without images, too."""
    recorded = {path.parent: read(path) for path in sorted((golden / "training").glob("*/steps.json"))}
    alone = {folder: steps for folder, steps in recorded.items() if "samples" in steps[0]}
    folder = next(folder for folder, steps in alone.items() if not all(step["has_image"] for step in steps))
    first = next(number for number, step in enumerate(alone[folder]) if not step["has_image"])
    has_image = [step["has_image"] for step in alone[folder]][first : first + 4]
    trained(folder, tmp_path / "run", 1, OTHERS, first, first + 3)
    for name in OTHERS:
        log = read(tmp_path / "run" / name / "rank0.json")
        assert log["kept"] == [True] * has_image.count(False), name
        assert log["optimizer_steps"] == [4, has_image.count(True)], name
