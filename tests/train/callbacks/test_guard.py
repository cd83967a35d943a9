"""The guards of a run: consecutive overflows, loss spikes and batches without targets, each with its samples."""

import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream, open_stream
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.flops import BatchCounts
from tinygptv_ds.train.callbacks.callback import LogRecord
from tinygptv_ds.train.callbacks.guard import Guard
from tinygptv_ds.train.metrics.accumulator import Computed, RankTimes, Totals
from tinygptv_ds.train.metrics.loss_spikes import LossSpikes

RAW = Callable[..., dict[str, Any]]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger=LOGGER.name):
        yield caplog


def watched(raw: dict[str, Any], run_dir: Path, precision: str = "fp32") -> tuple[Guard, SimpleNamespace, OpenStream]:
    """Return a guard of an engine with one rank, which has or has not taken its last step."""
    recipe = build_recipe(raw, "test")
    run_dir.mkdir(exist_ok=True)
    engine = SimpleNamespace(
        step_taken=True,
        device=torch.device("cpu"),
        all_reduce=lambda tensor: tensor,
        grad_norm=lambda: math.inf,
        loss_scale=lambda: 1.0,
        precision=precision,
    )
    job = SimpleNamespace(run_dir=run_dir)
    run = SimpleNamespace(engine=engine, recipe=recipe, ranks=Ranks(0, 0, 1, 1), job=job)
    stream = open_stream(recipe)
    return Guard(run, stream, SimpleNamespace(recent=[])), engine, stream


def on_step(guard: Guard, step: int, recent: list[Computed]) -> None:
    """Run a step after which these are the latest micro-batches."""
    guard._accumulator.recent = recent
    guard.on_step(step)


def spikes(guard: Guard, totals: Totals) -> float:
    """Return the number of spikes in a log line."""
    record = LogRecord(0, totals)
    guard.on_log(record)
    return record.metrics["train/spike"]


def computed(stream: OpenStream, step: int, losses: dict[int, float], dropped: tuple[int, ...] = ()) -> list[Computed]:
    """Return a step of one micro-batch with two targets per sample; `losses` by position, 1.0 for the others."""
    refs = [ref for place, ref in enumerate(stream.order.step(step)) if place not in dropped]
    first = step * stream.batch_size
    values = [losses.get(ref.position - first, 1.0) for ref in refs for _ in range(2)]
    which = torch.arange(len(refs)).repeat_interleave(2)
    return [Computed(step, tuple(refs), which, torch.tensor(values))]


def test_fp16_may_overflow_now_and_then(raw_recipe: RAW, tmp_path: Path) -> None:
    """A skipped step halves the scale; only consecutive ones, without a good step in between, stop the run."""
    guard, engine, stream = watched(raw_recipe(train__max_overflows=3), tmp_path, "fp16")
    for step, taken in enumerate((False, False, True, False, False, True, False, False)):
        engine.step_taken = taken
        on_step(guard, step, computed(stream, step, {}))
    with pytest.raises(TinyGPTVError, match=r"3 steps in a row overflowed in fp16 \(train.max_overflows\).*at step 9"):
        on_step(guard, 8, computed(stream, 8, {}))
    assert json.loads((tmp_path / "bad_step-9.json").read_text())["left_out_in_a_row"] == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_elsewhere_the_first_bad_step_ends_the_run(precision: str, raw_recipe: RAW, tmp_path: Path) -> None:
    """If all losses are finite, a gradient is not; the loss of a skipped sample is unknown."""
    guard, engine, stream = watched(raw_recipe(), tmp_path, precision)
    engine.step_taken = False
    with pytest.raises(TinyGPTVError, match="a gradient is not finite at step 6, though the loss of every sample is"):
        on_step(guard, 5, computed(stream, 5, {3: 2.5}, dropped=(1,)))
    written = json.loads((tmp_path / "bad_step-6.json").read_text())
    losses = [sample["loss"] for sample in written["ranks"][0]["samples"]]
    assert losses == [1.0, None, 1.0, 2.5, 1.0, 1.0, 1.0, 1.0]
    assert written["grad_norm"] == "inf"


def test_what_cannot_be_written_does_not_hide_the_stop(
    raw_recipe: RAW, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    guard, engine, stream = watched(raw_recipe(), tmp_path)
    engine.step_taken = False
    (tmp_path / "bad_step-1.json").mkdir()
    with pytest.raises(TinyGPTVError, match="not finite at step 1, for these samples"):
        on_step(guard, 0, computed(stream, 0, {0: math.nan}))
    assert "bad_step-1.json could not be written" in warnings.text


def totals(losses: list[tuple[int, float, float]], recent: list[Computed]) -> Totals:
    return Totals(1.0, {}, losses, {}, {}, BatchCounts(), [RankTimes(0, 0)], recent)


def test_a_spike_names_its_samples(raw_recipe: RAW, tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    guard, _, stream = watched(raw_recipe(), tmp_path)
    calm = [(step, 2.0 + 0.1 * (step % 5), 16.0) for step in range(60)]
    assert spikes(guard, totals(calm, [])) == 0
    recent = computed(stream, 60, {2: 70.0, 5: 90.0}) + computed(stream, 61, {})
    assert spikes(guard, totals([(60, 20.75, 16.0), (61, 2.1, 16.0)], recent)) == 1
    (said,) = [record.getMessage() for record in warnings.records]
    assert said.startswith("the loss of step 61 spikes: 20.7500, ")
    worst, next_one = (stream.order.step(60)[place] for place in (5, 2))
    names = [f"{ref.dataset}, {stream.shards[ref.dataset][ref.shard]}: sample " for ref in (worst, next_one)]
    assert said.index(names[0]) < said.index("(90.00)") < said.index(names[1]) < said.index("(70.00)")


def test_a_step_without_targets_is_reported(
    raw_recipe: RAW, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    guard, _, _ = watched(raw_recipe(), tmp_path)
    assert spikes(guard, totals([(4, math.nan, 0.0)], [])) == 0
    assert "step 5 had no target token on any rank" in warnings.text


def test_a_micro_batch_without_targets_is_reported(
    raw_recipe: RAW, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    """The warning names the planned samples; without any, e.g., with more ranks than samples, there is none."""
    guard, _, stream = watched(raw_recipe(), tmp_path)
    full, empty = (SimpleNamespace(batch=SimpleNamespace(targets=torch.zeros(n))) for n in (3, 0))
    guard.on_batch(2, [full, empty, full, full])
    (said,) = [record.getMessage() for record in warnings.records]
    planned = guard._planner.plan(2).micro_batch(1, 0)
    assert said.startswith("step 3: micro-batch 1 has no target token: ")
    assert len(planned) == 2 and all(f"{stream.shards[ref.dataset][ref.shard]}: sample" in said for ref in planned)
    guard.on_batch(2, [full, full, full, full, empty])
    assert len(warnings.records) == 1


@given(level=st.floats(0.01, 100), spread=st.floats(0, 0.7), seed=st.integers(0, 2**16))
def test_a_calm_run_has_no_spikes(level: float, spread: float, seed: int) -> None:
    """No level or spread of the loss, even that of very small batches, is a spike, nor is a falling loss."""
    draw, spikes = random.Random(seed), LossSpikes()
    for step in range(300):
        loss = level * math.exp(draw.uniform(-spread, spread) - step / 100)
        assert spikes.score(loss) <= 6.0
        spikes.add(loss)


def test_spikes_do_not_hide_spikes() -> None:
    """A non-finite loss is not used as a reference, and no spike is reported before there are enough losses."""
    spikes = LossSpikes()
    assert spikes.score(1e9) == 0.0
    for step in range(128):
        spikes.add((math.nan, math.inf)[step % 2] if step % 8 == 7 else 50.0 if step % 32 == 3 else 2.0 + step % 2 / 10)
    assert spikes.score(50.0) > 6.0 and spikes.score(math.inf) == math.inf
    assert spikes.score(2.3) < 6.0 and spikes.score(math.nan) == 0.0
    assert 2.0 <= spikes.median <= 2.1


def test_what_comes_often_is_no_spike() -> None:
    """With one dataset per step, every tenth step has three times the loss of the others."""
    spikes = LossSpikes()
    scores = []
    for step in range(300):
        loss = (6.0 if step % 10 == 0 else 2.0) * (1 + 0.001 * (step % 7))
        scores.append(spikes.score(loss))
        spikes.add(loss)
    assert max(scores) < 6.0 < spikes.score(200.0)


def test_the_table_of_losses_has_every_sample(raw_recipe: RAW, tmp_path: Path) -> None:
    """Refs are at their position in the step, regardless of the rank or micro-batch that computed them."""
    guard, _, stream = watched(raw_recipe(), tmp_path)
    refs = stream.order.step(7)
    halves = [refs[1::2], refs[::2]]
    recent = [
        Computed(7, tuple(half), torch.arange(len(half)), torch.tensor([float(ref.position) for ref in half]))
        for half in halves
    ]
    losses = guard._sample_losses(7, recent)
    assert losses == {ref: float(ref.position) for ref in refs}
    assert all(isinstance(ref, SampleRef) for ref in losses)
