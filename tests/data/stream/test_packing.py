"""Who computes which sample of a step: all of them once, alike on every rank, and about equally much on each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.data.stream.packing import LengthEstimate, StepPacking, pack, spread

COSTS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


def places(packing: StepPacking) -> list[int]:
    shares = [
        packing.share(micro, rank).tolist()
        for micro in range(packing.micro_batches)
        for rank in range(packing.world_size)
    ]
    assert all(share == sorted(share) for share in shares), "in the order of the stream"
    return sorted(sample for share in shares for sample in share)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.randoms())
def test_by_number_of_samples(world: int, micro_batch_size: int, accumulation: int, rng: object) -> None:
    n = world * micro_batch_size * accumulation
    cost = np.array([rng.uniform(1, 400) for _ in range(n)])
    packing = pack(cost, cost, world_size=world, micro_batch_size=micro_batch_size, max_tokens=None)
    assert places(packing) == list(range(n))
    assert packing.micro_batches == accumulation
    assert set(np.bincount(packing.place)) == {micro_batch_size}


@given(COSTS, st.integers(1, 5), st.integers(50, 900))
def test_by_tokens(tokens: list[int], world: int, max_tokens: int) -> None:
    """None above the limit but a sample that is by itself, and as many micro-batches on each rank."""
    rows = np.array(tokens, dtype=np.float64)
    packing = pack(rows + 7, rows, world_size=world, micro_batch_size=None, max_tokens=max_tokens)
    assert places(packing) == list(range(len(rows)))
    for micro in range(packing.micro_batches):
        for rank in range(world):
            share = packing.share(micro, rank)
            assert rows[share].clip(max=max_tokens).sum() <= max_tokens
    assert sorted(s for rank in range(world) for s in packing.rank_share(rank)) == list(range(len(rows)))


def test_by_tokens_takes_no_more_micro_batches_than_needed() -> None:
    rows = np.full(64, 100.0)
    assert pack(rows, rows, world_size=4, micro_batch_size=None, max_tokens=800).micro_batches == 2
    assert pack(rows, rows, world_size=4, micro_batch_size=None, max_tokens=799).micro_batches == 3
    assert pack(rows, rows, world_size=4, micro_batch_size=None, max_tokens=10).micro_batches == 16


@given(COSTS, st.integers(1, 9))
def test_spread_evens_out(weights: list[int], bins: int) -> None:
    """Numbers differ by one at most, sums by no more than the largest weight."""
    weight = np.array(weights, dtype=np.float64)
    which = spread(weight, bins)
    numbers, sums = np.bincount(which, minlength=bins), np.bincount(which, weight, bins)
    assert numbers.max() - numbers.min() <= 1
    assert sums.max() - sums.min() <= weight.max()


@pytest.mark.parametrize(("world", "per_rank"), [(8, 16), (64, 8), (512, 64)])
def test_the_slowest_rank_is_near_the_mean(world: int, per_rank: int) -> None:
    """Lengths as in stage 4: short answers, long conversations, some without an image. By turns it is far off."""
    rng = np.random.default_rng(world)
    n = world * per_rank
    tokens = rng.choice([40, 60, 90, 160, 400], n, p=[0.3, 0.3, 0.2, 0.15, 0.05]) * rng.uniform(0.7, 1.3, n)
    cost = tokens + 186 * (rng.random(n) > 0.05)
    packing = pack(cost, tokens, world_size=world, micro_batch_size=4, max_tokens=None)
    assert packing.imbalance(cost) < 0.05
    by_turns = StepPacking(np.arange(n) % world, 1, world)
    assert by_turns.imbalance(cost) > 3 * packing.imbalance(cost)


def test_ranks_are_alike_within_each_micro_batch() -> None:
    """Under ZeRO-3 every layer of every micro-batch waits for the slowest rank."""
    rng = np.random.default_rng(0)
    cost = rng.uniform(50, 500, 8 * 32)
    packing = pack(cost, cost, world_size=8, micro_batch_size=4, max_tokens=None)
    loads = np.bincount(packing.place, cost).reshape(8, 8)
    assert (loads.max(axis=1) / loads.mean(axis=1)).max() < 1.1


def test_estimate_counts_rows_as_they_are_laid_out() -> None:
    """BOS token, image rows, question, answer with its end; cut where the recipe cuts."""
    text = TextSection(prompt_template=None, end_sym="###", max_txt_len=20, max_context_len=100)
    estimate = LengthEstimate(text, image_cost=50.0)
    lengths = np.array([[1, 0, 9], [0, 10, 5], [1, 30, 400], [9, 500, 1]], dtype=np.uint16)
    assert estimate.tokens(lengths).tolist() == [1 + 32 + 10, 1 + 10 + 6, 1 + 62 + 20, 1 + 100 + 2]
    assert (estimate.cost(lengths) - estimate.tokens(lengths)).tolist() == [50, 0, 50, 450]
