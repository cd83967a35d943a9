"""A user's mistake that only running ranks notice: one readable error, exit code 2, no traceback from any rank."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.forked import Ranks, ended
from safetensors.torch import save_file

from tinygptv_ds.data.shards.writer import ShardWriter


def error_of(done: Ranks) -> str:
    assert "Traceback" not in done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.output
    assert not (done.folder / "model").exists()
    return errors[0]


def test_weights_that_do_not_fit(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """The mistake is found only after the ranks have met, which is the worst place for it."""
    stored = tmp_path / "projection.safetensors"
    save_file({"llama_proj.weight": torch.zeros(16, 32), "llama_proj.bias": torch.zeros(16)}, stored)
    recipe = recipe_file(model__init_from=str(stored), model__allow_missing=["llama_proj2", "norms", "lora"])
    done = ended(recipe, tmp_path / "run", ranks=2, code=2)
    assert str(stored) in error_of(done)
    assert "llama_proj.weight is [16, 32] instead of [24, 32]" in error_of(done)


def test_too_many_unreadable_samples(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Each sample is named with shard and key; the run stops once they are more than the recipe allows."""
    shards = tmp_path / "shards"
    shards.mkdir()
    with ShardWriter(shards, 8) as writer:
        for number in range(8):
            record = json.dumps({"text": "what ?", "answer": "that"}).encode()
            writer.write(f"key{number}", {"jpg": b"no image", "json": record} if number % 2 else {"json": record})
        writer.finish()
    recipe = recipe_file(data__datasets=[{"name": "vqa", "shards": str(shards)}])
    done = ended(recipe, tmp_path / "run", code=2)
    expected = "4 of 8 samples could not be used (4 corrupt_image), more than data.max_skipped_share (0.01)"
    assert expected in error_of(done)
    for number in (1, 3, 5, 7):
        assert f"skipped (corrupt_image) {shards / '00000.tar'}: sample key{number}: " in done.output
    allowed = ("--set=data.max_skipped_share=0.6", "--set=train.steps_per_epoch=2")
    resumed = ended(recipe, tmp_path / "allowed", *allowed)
    assert resumed.column("data/skipped_corrupt_image") == resumed.column("data/skipped") == [4, 4]
    assert "skipped so far: 8 corrupt_image" in (resumed.folder / "log.txt").read_text()
