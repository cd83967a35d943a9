"""Ten thousand steps of the loader take no more memory and open files than a few hundred."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader import MicroBatches, Tokens, load_steps
from tinygptv_ds.data.stream import open_stream
from tinygptv_ds.processing.sequence import ImageTokens

STEPS, WARM = 10_000, 1_000


def resident() -> int:
    """Bytes of memory that this process holds now, not at most."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ten_thousand_steps(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    """Pictures, texts and conversations, over hundreds of epochs of small datasets, whose orders are made anew."""
    one = {"train__batch_size": 1, "train__micro_batch_size": 1}
    recipe = build_recipe(raw_recipe(train__steps_per_epoch=STEPS, data__shuffle_shards=2, **one), "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    tokens = Tokens(tokenizer, recipe.text, ImageTokens(len(tokenizer) + 4, tiny.QUERIES), tiny.IMAGE_SIZE)
    dataset = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)
    before, seen = (0, 0), 0
    for step, loaded in enumerate(load_steps(dataset, first=0, last=STEPS, num_workers=0, pin_memory=False)):
        seen += sum(len(item.batch.sample_ids) for item in loaded)
        if step == WARM:
            before = resident(), open_files()
    assert seen == STEPS
    assert resident() < 1.01 * before[0]
    assert open_files() == before[1]
