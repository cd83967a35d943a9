"""Two ranks killed with -9 in the middle and started again see exactly the samples that an unbroken run sees.

The launcher starts those that are killed; the ranks of the other two runs are forked.
"""

import json
import re
from pathlib import Path

import pytest
from helpers import tiny
from helpers.forked import ended
from helpers.launcher import deepspeed_script, run

STEPS, SAVED_EVERY, KILLED_AFTER = 8, 3, 4
SCRIPT = "tests/launch/record_samples.py"


def fed(folder: Path, rank: int) -> list[tuple[int, list]]:
    return [tuple(json.loads(line)) for line in (folder / f"fed-{rank}.jsonl").read_text().splitlines()]


def test_killed_and_resumed(
    weights: Path, shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a dataloader worker, and micro-batches by tokens change in number from step to step."""
    raw = tiny.recipe(weights, shards, train__steps_per_epoch=STEPS, train__checkpoint_every=SAVED_EVERY)
    raw["train"] |= {"micro_batch_size": None, "max_tokens": 150}
    raw["data"]["num_workers"] = 1
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ended(recipe, whole, script=SCRIPT, ranks=2)
    with monkeypatch.context() as patch:
        patch.setenv("KILL_AFTER", str(KILLED_AFTER))
        killed = run(deepspeed_script(SCRIPT), recipe, broken, ok=False)
    assert killed.code != 0
    # Reported although the launcher, which looks once a second, ends rank 0.
    (said,) = re.findall(r"^error: rank 1 \(host .* was lost in step (\d) \(its process is gone\)", killed.output, re.M)
    assert int(said) in (KILLED_AFTER + 1, KILLED_AFTER + 2) and "step-00000003\n" in killed.output
    assert "Traceback" not in killed.output
    assert not (killed.folder / "model").exists()
    ended(recipe, broken, script=SCRIPT, ranks=2)
    for rank in range(2):
        unbroken = dict(fed(whole, rank))
        assert list(unbroken) == list(range(STEPS))
        seen = fed(broken, rank)
        assert [step for step, _ in seen] == [*range(KILLED_AFTER + 1), *range(SAVED_EVERY, STEPS)]
        assert all(ids == unbroken[step] for step, ids in seen)
    positions = [ref[0] for rank in range(2) for _, ids in fed(whole, rank) for micro in ids for ref in micro]
    assert sorted(positions) == list(range(STEPS * 8))
    assert (broken / "model/trained.safetensors").read_bytes() == (whole / "model/trained.safetensors").read_bytes()
