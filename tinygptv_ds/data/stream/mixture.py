"""The position of every sample: datasets mixed by weight, in exact shares, as a pure function of the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tinygptv_ds.data.stream.order import DatasetOrder, permutation, stable_hash
from tinygptv_ds.errors import ConfigError

MAX_CYCLE = 1_000_000


@dataclass(frozen=True)
class SampleRef:
    """One sample of the stream: `position` counts samples from 0, the other fields locate it."""

    position: int
    dataset: str
    epoch: int
    shard: int
    index: int


class Mixture:
    """Positions shared out to datasets: of every `cycle` positions, each dataset has exactly its weight's share.

    Weights are numbers or fractions such as "1/3"; only their ratios count, and so does not the order in which the
    datasets are listed. Raises ConfigError for a weight that is no positive number, or if no cycle of at most
    1,000,000 positions holds the exact shares.
    """

    def __init__(self, weights: Mapping[str, int | float | str], *, seed: int = 0) -> None:
        self._names = sorted(weights)
        self._counts = _integer_shares({name: weights[name] for name in self._names})
        self.cycle = sum(self._counts)
        self._slots = np.repeat(np.arange(len(self._names)), self._counts)
        self._starts = np.cumsum([0, *self._counts])
        self._seed = seed
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def shares(self) -> dict[str, int]:
        """Positions of each dataset in a cycle."""
        return dict(zip(self._names, self._counts, strict=True))

    @property
    def names(self) -> list[str]:
        """The datasets in the order that `deal` counts."""
        return self._names

    def locate(self, position: int) -> tuple[str, int]:
        """Return (dataset, number k of its draw) at `position`; a dataset's draws come in the order k = 0, 1, ..."""
        which, k = self.deal(position, 1)
        return self._names[which[0]], int(k[0])

    def deal(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (dataset number, number k of its draw), int64 [count] each, of the positions from `first` on."""
        if len(self._names) == 1:
            return np.zeros(count, dtype=np.int64), np.arange(first, first + count)
        counts = np.array(self._counts)
        parts = []
        for cycle in range(first // self.cycle, -(-(first + count) // self.cycle)):
            which, occurrence = self._arrangement(cycle)
            start = cycle * self.cycle
            piece = slice(max(first - start, 0), first + count - start)
            parts.append((which[piece], cycle * counts[which[piece]] + occurrence[piece]))
        return np.concatenate([which for which, _ in parts]), np.concatenate([k for _, k in parts])

    def position_of(self, name: str, k: int) -> int:
        """Return the position at which `locate` gives this draw."""
        number = self._names.index(name)
        cycle, occurrence = divmod(k, self._counts[number])
        which, _ = self._arrangement(cycle)
        return cycle * self.cycle + int(np.flatnonzero(which == number)[occurrence])

    def _arrangement(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (dataset number [C], how often it has occurred in the cycle before [C]) for the slots of a cycle."""
        if self._cached is None or self._cached[0] != cycle:
            which = self._slots[permutation(self.cycle, (self._seed, "mixture", cycle))]
            by_dataset = np.argsort(which, kind="stable")
            occurrence = np.empty_like(by_dataset)
            occurrence[by_dataset] = np.arange(self.cycle) - self._starts[which[by_dataset]]
            self._cached = (cycle, which, occurrence)
        return self._cached[1:]


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step as int64 arrays [batch]; `position` and `dataset` (number in `names`) included."""

    names: Sequence[str]
    position: np.ndarray
    dataset: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    def refs(self, which: np.ndarray | slice = slice(None)) -> list[SampleRef]:
        """Some of the samples one by one; all by default."""
        columns = (self.position, self.dataset, self.epoch, self.shard, self.index)
        rows = zip(*(column[which].tolist() for column in columns), strict=True)
        return [SampleRef(p, self.names[d], epoch, shard, index) for p, d, epoch, shard, index in rows]


class Stream:
    """The endless training stream: step -> the samples of the whole optimizer step, on all ranks together.

    A pure function of the datasets, the mixture and the step: nothing is remembered but caches, so any process can
    compute any step. With `homogeneous`, the mixture shares out whole steps and each holds one dataset.
    """

    def __init__(
        self, datasets: Mapping[str, DatasetOrder], mixture: Mixture, *, batch_size: int, homogeneous: bool = False
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"the batch size must be at least 1, not {batch_size}")
        if set(datasets) != set(mixture.shares):
            raise ConfigError(
                f"datasets {sorted(datasets)} and weights {sorted(mixture.shares)} differ; name each once"
            )
        self._datasets = datasets
        self._mixture = mixture
        self._batch_size = batch_size
        self._homogeneous = homogeneous

    def step(self, t: int) -> list[SampleRef]:
        """Return the `batch_size` samples of step `t`, 0 <= t."""
        return self.samples(t).refs()

    def samples(self, t: int) -> StepSamples:
        """Return `step` as arrays."""
        size = self._batch_size
        first = t * size
        if self._homogeneous:
            (number,), (k,) = self._mixture.deal(t, 1)
            which, draws = np.full(size, number), k * size + np.arange(size)
        else:
            which, draws = self._mixture.deal(first, size)
        located = np.zeros((3, size), dtype=np.int64)
        for number in np.unique(which):
            mine = np.flatnonzero(which == number)  # consecutive draws of the dataset
            order = self._datasets[self._mixture.names[number]]
            located[:, mine] = np.stack(order.draws(int(draws[mine[0]]), len(mine)))
        return StepSamples(self._mixture.names, first + np.arange(size), which, *located)

    def position_of(self, name: str, k: int) -> int:
        """Return the position of draw `k` of a dataset in the stream."""
        if not self._homogeneous:
            return self._mixture.position_of(name, k)
        step, place = divmod(k, self._batch_size)
        return self._mixture.position_of(name, step) * self._batch_size + place

    def steps_per_epoch(self) -> int:
        """Number of steps after which every sample of every dataset has been seen at least once."""
        if self._homogeneous:
            last = {name: (len(order) - 1) // self._batch_size for name, order in self._datasets.items()}
            return 1 + max(self._mixture.position_of(name, k) for name, k in last.items())
        last_position = max(self._mixture.position_of(name, len(order) - 1) for name, order in self._datasets.items())
        return last_position // self._batch_size + 1


def sample_rng(seed: int, ref: SampleRef) -> Callable[[int], int]:
    """Return a `draw(n)` of uniform integers in [0, n), in the same sequence whenever the sample is read in that epoch.

    Depends on neither the position in the stream nor on who reads it.
    """
    return _draws(seed, "sample", ref.dataset, ref.epoch, ref.shard, ref.index)


def step_rng(seed: int, step: int) -> Callable[[int], int]:
    """Return a `draw(n)` as `sample_rng` does, the same for all samples of a step."""
    return _draws(seed, "step", step)


def _draws(*key: str | int) -> Callable[[int], int]:
    calls = 0

    def draw(n: int) -> int:
        nonlocal calls
        calls += 1
        # 256 bits: the remainder's bias is far below what could ever be noticed
        return stable_hash(*key, calls) % n

    return draw


def _integer_shares(weights: Mapping[str, int | float | str]) -> list[int]:
    if not weights:
        raise ConfigError("the mixture names no dataset; give at least one weight")
    exact = [_exact(name, weight) for name, weight in weights.items()]
    common = math.lcm(*(fraction.denominator for fraction in exact))
    counts = [int(fraction * common) for fraction in exact]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) > MAX_CYCLE:
        raise ConfigError(
            f"the exact shares of these weights repeat only after {sum(counts):,} samples (at most {MAX_CYCLE:,}); "
            f"use rounder weights, such as whole numbers below 1000"
        )
    return counts


def _exact(name: str, weight: float | str) -> Fraction:
    """Return the weight as it is written: 0.1 is one tenth."""
    try:
        fraction = Fraction(str(weight))
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if fraction <= 0:
        raise ConfigError(f"weight of dataset {name}: {weight!r} is no positive number; leave the dataset out instead")
    return fraction
