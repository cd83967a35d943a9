"""Parts of the training loop that need no engine: skipped samples, sums, the loss scale, the panel's samples."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.sample import SkippedSample, Tokens
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import DataError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.sequence import ImageTokens
from tinygptv_ds.train.callbacks.sample_panel import PanelSample, _choose
from tinygptv_ds.train.callbacks.skipped_samples import SkippedSamples
from tinygptv_ds.train.callbacks.token_limit import TokenLimit
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.loss_scale import LossScale
from tinygptv_ds.train.step import dropout_seed

REF = SampleRef(0, "vqa", 0, 0, 0)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Return the records of the program's logger, independent of its setup by earlier tests."""
    with caplog.at_level(logging.WARNING, logger=LOGGER.name):
        yield caplog


def dropped(count: int) -> list[MicroBatch]:
    return [
        MicroBatch(None, tuple(SkippedSample(REF, "corrupt_image", f"a.tar: sample k{i}: torn") for i in range(count)))
    ]


def seen(skipped: dict[str, int], samples: int) -> SimpleNamespace:
    """Return the part of `Totals` that is checked."""
    return SimpleNamespace(skipped=skipped, samples={"a": samples, "b": 0})


def test_skipped_samples_are_named(warnings: pytest.LogCaptureFixture) -> None:
    SkippedSamples(0.5, 100).on_batch(0, dropped(2))
    assert [r.getMessage() for r in warnings.records] == [
        "skipped (corrupt_image) a.tar: sample k0: torn",
        "skipped (corrupt_image) a.tar: sample k1: torn",
    ]


def test_too_many_skipped_samples_stop_the_run(warnings: pytest.LogCaptureFixture) -> None:
    """The share refers to all samples seen, or to the whole length of a short run."""
    counter = SkippedSamples(0.1, samples_of_run=50)
    counter.judge(seen({"corrupt_image": 3, "too_long": 2}, 5))  # 5 of 50
    assert counter.summary() == "3 corrupt_image, 2 too_long"
    counter.on_batch(0, dropped(12))
    with pytest.raises(
        DataError, match=r"6 of 20 samples .*\(4 corrupt_image, 2 too_long\), more than .*share \(0.1\)"
    ) as caught:
        counter.judge(seen({"corrupt_image": 1}, 9))
    assert str(caught.value).count("\n  - a.tar: sample k") == 10  # the last ones
    assert "sample k11" in str(caught.value) and "sample k1:" not in str(caught.value)


def test_a_long_run_is_judged_by_what_it_has_seen() -> None:
    counter = SkippedSamples(0.01, samples_of_run=10**6)
    counter.judge(seen({"truncated": 10}, 90))  # of the first 1000
    counter.judge(seen({"truncated": 10}, 1890))  # 20 of 2000
    with pytest.raises(DataError, match="21 of 2001"):
        counter.judge(seen({"truncated": 1}, 0))


def test_none_may_be_skipped_with_a_share_of_zero() -> None:
    counter = SkippedSamples(0.0, samples_of_run=100)
    counter.judge(seen({}, 10))
    with pytest.raises(DataError, match="1 of 11 samples"):
        counter.judge(seen({"bad_json": 1}, 0))


def test_the_random_seed_is_a_function_of_step_and_rank() -> None:
    seeds = [dropout_seed(42, step, rank) for step in range(10) for rank in range(4)]
    assert len(set(seeds)) == 40 and seeds == [dropout_seed(42, s, r) for s in range(10) for r in range(4)]
    for seed in seeds:
        torch.manual_seed(seed)


# ---- the loss scale of fp16 ------------------------------------------------------------------------------------------


class FakeOptimizer:
    torch_autocast_gradscaler = object()

    def __init__(self) -> None:
        self.scales: list[float] = []

    def override_loss_scale(self, value: float) -> None:
        self.scales.append(value)


def test_the_loss_scale_halves_and_doubles() -> None:
    optimizer = FakeOptimizer()
    scale = LossScale(optimizer)
    assert optimizer.torch_autocast_gradscaler is None  # DeepSpeed's own is out of the way
    scale.update(skipped=True)
    scale.update(skipped=True)
    assert (scale.value, scale.good_steps) == (16384.0, 0)
    for _ in range(1999):
        scale.update(skipped=False)
    assert (scale.value, scale.good_steps) == (16384.0, 1999)
    scale.update(skipped=False)
    assert (scale.value, scale.good_steps) == (32768.0, 0)
    assert optimizer.scales == [65536.0, 32768.0, 16384.0, 32768.0]


def test_the_loss_scale_is_that_of_torch() -> None:
    """The scale equals that of a GradScaler with the same overflows, step by step."""
    torchs = torch.amp.GradScaler("cpu", growth_interval=2000)
    ours = LossScale(FakeOptimizer())
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step in range(4500):
        overflow = step in (0, 1, 2100, 2101)
        torchs.scale(torch.ones(()))
        parameter.grad = torch.full((1,), float("inf") if overflow else 1.0)
        torchs.step(optimizer)
        torchs.update()
        ours.update(skipped=overflow)
        assert ours.value == torchs.get_scale(), step


def test_skipped_steps_count_over_resumptions() -> None:
    """Otherwise the next checkpoint would give AdamW a step count that includes skipped steps."""
    engine = object.__new__(Engine)
    engine.deepspeed, engine.skipped_before = SimpleNamespace(skipped_steps=2), 3
    assert engine.skipped_steps == 5


# ---- the panel -------------------------------------------------------------------------------------------------------


def chosen(raw: dict[str, Any], count: int) -> list[PanelSample]:
    recipe = build_recipe(raw, "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    tokens = Tokens(tokenizer, recipe.text, ImageTokens(len(tokenizer) + 4, tiny.QUERIES), tiny.IMAGE_SIZE)
    return _choose(open_stream(recipe), tokens, count)


def test_the_panel_takes_datasets_by_turns(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    panel = chosen(raw_recipe(), 6)
    assert [shown.sample.images for shown in panel] == [1, 0, 1, 2, 1, 0]  # vqa, text, chat, pair, vqa, text
    assert [shown.prompt.count("<ImageHere>") for shown in panel] == [1, 0, 1, 2, 1, 0]
    assert all(shown.prompt.startswith("[INST] ") and shown.truth for shown in panel)
    again = chosen(raw_recipe(), 6)
    assert [(shown.prompt, shown.truth, shown.sample.ref) for shown in panel] == [
        (shown.prompt, shown.truth, shown.sample.ref) for shown in again
    ]
    assert panel[0].prompt == chosen(raw_recipe(), 1)[0].prompt
    assert chosen(raw_recipe(), 0) == []


def test_the_panel_leaves_out_what_cannot_be_read(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    made = tiny.samples("vqa", 3)
    made[0] = type(made[0])("torn", made[0].record, (made[0].images[0][:100],))
    shards = tiny.write_shards(tmp_path / "vqa", made)
    panel = chosen(raw_recipe(data__datasets=[{"name": "vqa", "shards": str(shards)}]), 5)
    seen = {shown.sample.pixels[0].tobytes() for shown in panel}
    assert seen == {to_pixels(sample.images[0], tiny.IMAGE_SIZE).tobytes() for sample in made[1:]}
    assert len(panel) == 2


def test_micro_batches_above_the_limit_are_reported(warnings: pytest.LogCaptureFixture) -> None:
    """There is one warning for those since the last log line, and none without a limit."""
    lengths = [SimpleNamespace(batch=SimpleNamespace(input_ids=torch.zeros(n))) for n in (90, 130, 110)]
    over, free = TokenLimit(100), TokenLimit(None)
    for counter in (over, free):
        counter.on_batch(0, lengths)
        counter.on_log(None)
        counter.on_log(None)
    (message,) = [record.getMessage() for record in warnings.records]
    assert message.startswith("2 micro-batches of this rank had more than train.max_tokens (100) tokens, 130 at most")
