"""Ten thousand steps of the loader take no more memory and open files than a few hundred."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import tiny
from helpers.forked import apart
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.processing.sequence import ImageTokens

STEPS, WARM = 10_000, 1_000


def resident() -> int:
    """Return the bytes of memory that this process holds now, not its peak."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def run(raw: dict[str, Any]) -> tuple[int, list[tuple[int, int]]]:
    """Return how many samples were seen, and what was held after `WARM` steps and at the end."""
    recipe = build_recipe(raw, "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    tokens = Tokens(tokenizer, recipe.text, ImageTokens(len(tokenizer) + 4, tiny.QUERIES), tiny.IMAGE_SIZE)
    dataset = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)
    held, seen = [], 0
    for step, loaded in enumerate(load_steps(dataset, first=0, last=STEPS, num_workers=0, pin_memory=False)):
        seen += sum(len(item.batch.sample_ids) for item in loaded)
        if step in (WARM, STEPS - 1):
            held.append((resident(), open_files()))
    return seen, held


def test_ten_thousand_steps(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    """They go through images, texts and conversations, over hundreds of epochs of small datasets with new orders."""
    one = {"train__batch_size": 1, "train__micro_batch_size": 1}
    raw = raw_recipe(train__steps_per_epoch=STEPS, data__shuffle_shards=2, **one)
    seen, ((memory, files), (memory_after, files_after)) = apart(run, raw)
    assert seen == STEPS
    assert memory_after < 1.01 * memory
    assert files_after == files
