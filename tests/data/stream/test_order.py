import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptv_ds.data.stream.order import DatasetOrder, permutation
from tinygptv_ds.errors import ConfigError, DataError

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)


def test_permutation_never_changes() -> None:
    """Pinned: runs started before an upgrade of NumPy or of this package must resume into the same order."""
    assert permutation(10, (42, "laion", "shards", 0)).tolist() == [4, 7, 5, 9, 6, 0, 2, 8, 3, 1]


@given(st.integers(0, 200), st.integers(0, 5))
def test_permutation_is_one(n: int, seed: int) -> None:
    assert sorted(permutation(n, (seed, "x")).tolist()) == list(range(n))


def test_permutation_depends_on_every_part_of_the_seed() -> None:
    seeds = [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1), ("1", "a", 0), (1, "a0")]
    assert len({permutation(50, seed).tobytes() for seed in seeds}) == len(seeds)


def test_permutation_is_uniform() -> None:
    """Each of the six orders of three about equally often (the limit is 5 standard deviations)."""
    seen = Counter(tuple(permutation(3, ("uniform", i)).tolist()) for i in range(6000))
    assert len(seen) == 6
    assert all(abs(count - 1000) < 5 * np.sqrt(1000) for count in seen.values())


@settings(deadline=None)
@given(COUNTS, st.integers(1, 9), st.integers(0, 3))
def test_every_sample_exactly_once_an_epoch(counts: list[int], window: int, epoch: int) -> None:
    order = DatasetOrder(counts, seed=7, name="x", window=window)
    drawn = [order.locate(epoch * len(order) + k) for k in range(len(order))]
    assert sorted(drawn) == [(epoch, shard, i) for shard, count in enumerate(counts) for i in range(count)]


@settings(deadline=None)
@given(COUNTS, st.integers(1, 9), st.randoms())
def test_locate_is_pure(counts: list[int], window: int, rng: random.Random) -> None:
    """Same answers in any order of calls, from any starting point, from a fresh object: what resume rests on."""
    order = DatasetOrder(counts, seed=7, name="x", window=window)
    draws = list(range(3 * len(order)))
    straight = {k: order.locate(k) for k in draws}
    rng.shuffle(draws)
    assert {k: order.locate(k) for k in draws} == straight
    k = draws[0]
    assert DatasetOrder(counts, seed=7, name="x", window=window).locate(k) == straight[k]


def test_samples_stay_inside_their_window_and_are_mixed_within() -> None:
    """Reading stays local: at any time draws come from `window` shards only, and from all of these in turn."""
    order = DatasetOrder([50] * 12, seed=0, name="x", window=3)
    shards = [order.locate(k)[1] for k in range(600)]
    for start in range(0, 600, 150):
        window = shards[start : start + 150]
        assert len(set(window)) == 3
        assert sum(a != b for a, b in pairwise(window)) > 60  # 100 expected
    assert len(set(shards)) == 12


def test_epochs_seeds_and_names_differ() -> None:
    def epoch(seed: int, name: str, number: int) -> list:
        order = DatasetOrder([20, 20, 20], seed=seed, name=name, window=2)
        return [order.locate(60 * number + k)[1:] for k in range(60)]

    orders = [epoch(0, "a", 0), epoch(0, "a", 1), epoch(1, "a", 0), epoch(0, "b", 0)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])


def test_huge_datasets_cost_no_memory_by_sample() -> None:
    """52 million samples in 12,000 shards: arrays by shard and by window only."""
    order = DatasetOrder([4_333] * 12_000, seed=0, name="laion", window=16)
    for k in (0, 10_000_000, 51_995_999, 51_996_000, 10**12):
        order.locate(k)
    arrays = [a for pair in order._epochs.values() for a in pair] + list(order._windows.values())
    assert sum(array.nbytes for array in arrays) < 4_000_000


def test_errors() -> None:
    with pytest.raises(DataError, match="x: its 2 shard"):
        DatasetOrder([0, 0], seed=0, name="x", window=1)
    with pytest.raises(ConfigError, match="window"):
        DatasetOrder([1], seed=0, name="x", window=0)
