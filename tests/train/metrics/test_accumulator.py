"""The sums of a run between two log lines, and the metrics that follow from them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.sample import SkippedSample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.models.flops import BatchCounts, FlopRates
from tinygptv_ds.train.metrics.accumulator import Accumulator, RankTimes, Totals
from tinygptv_ds.train.metrics.reporter import rates, straggling, training_scalars


def ref(position: int, dataset: str) -> SampleRef:
    return SampleRef(position, dataset, 0, 0, position)


def engine(world_size: int = 1, rank: int = 0, others: Tensor | None = None) -> SimpleNamespace:
    """Return an engine whose sum over the ranks adds the values of `others`."""

    def all_reduce(tensor: Tensor) -> Tensor:
        return tensor if others is None else tensor + others

    ranks = Ranks(rank, rank, world_size, world_size)
    return SimpleNamespace(device=torch.device("cpu"), all_reduce=all_reduce, ranks=ranks)


def micro(lengths: list[int], targets: list[int], datasets: list[int], refs: list[SampleRef]) -> SimpleNamespace:
    """Return the counted part of a batch; `targets` are rows, `datasets` their datasets."""
    return SimpleNamespace(
        input_ids=torch.zeros(sum(lengths)),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        target_rows=torch.tensor(targets, dtype=torch.long),
        targets=torch.zeros(len(targets)),
        target_dataset=torch.tensor(datasets, dtype=torch.long),
        pixel_values=torch.zeros(len(refs), 3, 1, 1),
        image_features=None,
        sample_ids=tuple(refs),
        has_image=lambda: np.array([ref.dataset == "a" for ref in refs], dtype=bool),
    )


def add(
    accumulator: Accumulator, step: int, batch: SimpleNamespace, losses: list[float], skipped: tuple[str, ...] = ()
) -> None:
    dropped = tuple(SkippedSample(ref(0, "a"), reason, "gone") for reason in skipped)
    accumulator.add(step, MicroBatch(batch, dropped), batch, torch.tensor(losses))


def test_sums_are_means_over_tokens() -> None:
    """A dataset's loss is the mean over its target tokens, the total loss that over all; reading resets the sums."""
    accumulator = Accumulator(engine(), ["a", "b", "c"])
    first = micro([3, 2], [0, 1, 3], [0, 0, 1], [ref(0, "a"), ref(1, "b")])
    add(accumulator, 4, first, [1.0, 2.0, 7.0])
    add(accumulator, 5, micro([4], [2], [0], [ref(2, "a")]), [6.0], ("too_long",))
    add(accumulator, 6, micro([1], [], [], []), [], ("corrupt_image", "too_long"))
    totals = accumulator.read(RankTimes(0.5, 0.25))
    assert totals.loss == 4.0
    assert totals.loss_by_dataset == {"a": 3.0, "b": 7.0}
    assert totals.steps[:2] == [(4, 10 / 3, 3.0), (5, 6.0, 1.0)]
    assert totals.steps[2][0] == 6 and math.isnan(totals.steps[2][1]) and totals.steps[2][2] == 0
    assert totals.samples == {"a": 2, "b": 1, "c": 0}
    assert totals.with_images == {"a": 2, "b": 0, "c": 0}
    scalars = training_scalars(totals)
    assert [scalars[f"data/{kind}_{name}"] for name in "ab" for kind in ("with_image", "text_only")] == [2, 0, 0, 1]
    assert totals.skipped == {"corrupt_image": 1, "too_long": 2}
    assert totals.work == BatchCounts(tokens=10, squares=9 + 4 + 16 + 1, targets=4, images=3)
    assert totals.ranks == [RankTimes(0.5, 0.25)]
    (left, right) = totals.recent[0].sample_losses()
    assert left == (ref(0, "a"), 3.0, 2) and right == (ref(1, "b"), 7.0, 1)
    again = accumulator.read(RankTimes(0.0, 0.0))
    assert (again.loss, again.steps, again.samples["a"], again.work, again.recent) == (0.0, [], 0, BatchCounts(), [])


def test_ranks_are_distinguished() -> None:
    """Each rank's times have their own position in the sum."""
    alone = Accumulator(engine(world_size=3, rank=1), ["a"])
    assert alone.read(RankTimes(2.0, 3.0)).ranks == [RankTimes(0, 0), RankTimes(2.0, 3.0), RankTimes(0, 0)]


def totals(ranks: list[RankTimes]) -> Totals:
    work = BatchCounts(tokens=1000, squares=20_000, targets=300, images=8)
    steps = [(0, 2.0, 150), (1, 2.0, 150)]
    return Totals(2.0, {"a": 2.0}, steps, {"a": 12, "b": 4}, {"too_long": 3}, work, ranks, [])


def test_rates() -> None:
    ranks = [RankTimes(0.1, 1.0), RankTimes(1.5, 0.9)]
    costs = FlopRates(token=1e9, square=1e6, target=2e9, image=1e11)
    found = rates(totals(ranks), 4.0, costs, peak=1e12)
    operations = 1e12 + 2e10 + 6e11 + 8e11
    assert found == pytest.approx(
        {
            "perf/samples_s": 4.0,
            "perf/tokens_s": 250.0,
            "perf/target_tokens_s": 75.0,
            "perf/step_seconds": 2.0,
            "perf/tflops": operations / 4 / 2 / 1e12,
            "perf/mfu": 100 * operations / 4 / 2 / 1e12,
            "perf/data_wait_pct": 20.0,
            "perf/data_wait_max_pct": 37.5,
            "perf/slowest_rank": 1,
            "perf/slowest_seconds": 1.2,
        }
    )
    assert "perf/mfu" not in rates(totals(ranks), 4.0, costs, peak=None)


def test_shares_of_the_mixture() -> None:
    scalars = training_scalars(totals([RankTimes(0, 0)]))
    assert scalars["data/mix_a"] == 75.0 and scalars["data/mix_b"] == 25.0
    assert scalars["data/skipped"] == scalars["data/skipped_too_long"] == 3
    assert scalars["train/loss"] == scalars["train/loss_a"] == 2.0


def test_the_rank_that_holds_up_the_others_is_named() -> None:
    """A rank is named for its data wait or forward passes once the others lose more than a tenth of the time."""
    even = [RankTimes(0.1, 1.0)] * 7
    assert straggling(even, 4.0) is None
    assert straggling([*even, RankTimes(0.4, 1.0)], 4.0) is None  # 0.3 of 4 seconds
    slow = straggling([*even, RankTimes(2.1, 1.0)], 4.0)
    assert slow.startswith("rank 7 holds up the others: data wait 52 % (2 %), forward passes 25 % (25 %)")
    assert straggling([RankTimes(0.1, 2.0), *even], 4.0).startswith("rank 0 holds up the others")
    assert straggling([RankTimes(9.0, 9.0)], 20.0) is None  # nobody waits for it
