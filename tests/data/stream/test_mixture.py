import random
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptv_ds.data.stream.mixture import Mixture, SampleRef, Stream, sample_rng
from tinygptv_ds.data.stream.order import DatasetOrder
from tinygptv_ds.errors import ConfigError

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1)


def stream(weights: dict[str, int], counts: list[int], batch_size: int, **options: bool) -> Stream:
    orders = {
        name: DatasetOrder([*counts, len(name) + i], seed=1, name=name, window=2) for i, name in enumerate(weights)
    }
    return Stream(orders, Mixture(weights, seed=1), batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"laion": 115 * 64, "cc_sbu": 14 * 64}, {"cc_sbu": 14, "laion": 115}),
        ({"a": 0.1, "b": 0.2}, {"a": 1, "b": 2}),  # as written, not as the nearest binary number
        ({"a": "1/3", "b": "2/3", "c": 1}, {"a": 1, "b": 2, "c": 3}),
        ({"a": 5}, {"a": 1}),
    ],
)
def test_weights_become_the_smallest_integers(weights: dict, shares: dict) -> None:
    mixture = Mixture(weights)
    assert (mixture.shares, mixture.cycle) == (shares, sum(shares.values()))


@pytest.mark.parametrize("weight", [0, -1, "x", "1/0", float("nan"), float("inf"), None, True])
def test_useless_weights_are_refused_by_name(weight: object) -> None:
    with pytest.raises(ConfigError, match="weight of dataset b"):
        Mixture({"a": 1, "b": weight})


def test_endless_cycles_and_no_dataset_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounder weights"):
        Mixture({"a": 0.123456789, "b": 1})
    with pytest.raises(ConfigError, match="no dataset"):
        Mixture({})


@given(WEIGHTS, st.integers(0, 3), st.integers(0, 5))
def test_every_cycle_holds_exact_shares_and_every_draw_once(weights: dict, cycle: int, seed: int) -> None:
    mixture = Mixture(weights, seed=seed)
    drawn = defaultdict(list)
    for position in range(cycle * mixture.cycle, (cycle + 1) * mixture.cycle):
        name, k = mixture.locate(position)
        drawn[name].append(k)
        assert mixture.position_of(name, k) == position
    # in the order of the positions: a dataset's windows are read one after the other
    assert drawn == {n: list(range(cycle * share, (cycle + 1) * share)) for n, share in mixture.shares.items()}
    total = sum(weights.values())
    assert all(Fraction(len(drawn[n]), mixture.cycle) == Fraction(w, total) for n, w in weights.items())


def test_the_listing_order_of_datasets_does_not_matter_but_the_seed_does() -> None:
    def sequence(weights: dict, seed: int) -> list:
        return [Mixture(weights, seed=seed).locate(p) for p in range(40)]

    assert sequence({"a": 3, "b": 5}, 0) == sequence({"b": 5, "a": 3}, 0)
    assert sequence({"a": 3, "b": 5}, 0) != sequence({"a": 3, "b": 5}, 1)


@settings(deadline=None)
@given(WEIGHTS, st.lists(st.integers(0, 5), max_size=3), st.integers(1, 7), st.booleans(), st.randoms())
def test_steps_are_pure(weights: dict, counts: list, batch: int, homogeneous: bool, rng: random.Random) -> None:
    """A step is the same whichever were asked for before: resume and loader workers start anywhere."""
    straight = [stream(weights, counts, batch, homogeneous=homogeneous).step(t) for t in range(12)]
    steps = list(range(12))
    rng.shuffle(steps)
    mixed = stream(weights, counts, batch, homogeneous=homogeneous)
    assert all(mixed.step(t) == straight[t] for t in steps)
    assert [ref.position for step in straight for ref in step] == list(range(12 * batch))


@settings(deadline=None)
@given(WEIGHTS, st.lists(st.integers(0, 5), max_size=3), st.integers(1, 7), st.booleans())
def test_steps_per_epoch_is_the_first_step_at_which_all_has_been_seen(
    weights: dict, counts: list, batch: int, homogeneous: bool
) -> None:
    found = stream(weights, counts, batch, homogeneous=homogeneous)
    steps = found.steps_per_epoch()

    def unseen(steps: int) -> int:
        refs = [ref for t in range(steps) for ref in found.step(t)]
        seen = {(ref.dataset, ref.shard, ref.index) for ref in refs}
        return sum(sum(counts) + len(name) + i for i, name in enumerate(weights)) - len(seen)

    assert unseen(steps) == 0
    assert unseen(steps - 1) > 0


def test_no_sample_comes_twice_within_an_epoch_of_its_dataset() -> None:
    found = stream({"a": 3, "b": 2}, [7, 4], 5)
    refs = [ref for t in range(40) for ref in found.step(t)]
    assert max(Counter((ref.dataset, ref.epoch, ref.shard, ref.index) for ref in refs).values()) == 1


def test_homogeneous_steps_hold_one_dataset_by_weight() -> None:
    found = stream({"a": 3, "b": 1}, [9], 4, homogeneous=True)
    datasets = [{ref.dataset for ref in found.step(t)} for t in range(8)]
    assert all(len(names) == 1 for names in datasets)
    assert sum(names == {"a"} for names in datasets) == 6


def test_stream_refuses_what_does_not_fit_together() -> None:
    order = DatasetOrder([3], seed=0, name="a", window=1)
    with pytest.raises(ConfigError, match="differ"):
        Stream({"a": order}, Mixture({"b": 1}), batch_size=2)
    with pytest.raises(ConfigError, match="batch size"):
        Stream({"a": order}, Mixture({"a": 1}), batch_size=0)


def test_sample_draws_never_change() -> None:
    """Pinned, and of the sample alone: its place in the stream or its reader makes no difference."""
    draw = sample_rng(42, SampleRef(5, "coco_vqa", 1, 2, 3))
    assert [draw(1000) for _ in range(4)] == [455, 637, 95, 916]
    draw = sample_rng(42, SampleRef(99, "coco_vqa", 1, 2, 3))
    assert [draw(1000) for _ in range(4)] == [455, 637, 95, 916]


def test_sample_draws_differ_and_are_uniform() -> None:
    refs = [SampleRef(0, "a", epoch, shard, i) for epoch in range(2) for shard in range(2) for i in range(500)]
    draws = [sample_rng(0, ref) for ref in refs]
    first, second = ([draw(10) for draw in draws] for _ in range(2))
    for values in (first, second):
        assert all(abs(count - 200) < 5 * 200**0.5 for count in Counter(values).values())
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 300  # 200 expected
    assert [sample_rng(0, ref)(10) for ref in refs] != [sample_rng(1, ref)(10) for ref in refs]
