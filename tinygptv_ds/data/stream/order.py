"""The order of one dataset's samples, as a pure function: draw number -> (epoch, shard, index).

Every epoch visits every sample once. Shards are permuted again in each epoch, and samples are permuted inside windows
of a few consecutive shards of that order, so that reading stays local while neighbors in a shard are separated.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinygptv_ds.errors import ConfigError, DataError


def stable_hash(*parts: str | int) -> int:
    """Return a 256-bit number that is the same for the same strings and integers on every machine and version."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest())


def permutation(n: int, seed: tuple[str | int, ...]) -> np.ndarray:
    """Return a uniform permutation of range(n), int64 [n], that depends on `n` and `seed` alone.

    Sorted raw generator output: NumPy guarantees PCG64's bit stream, but not what `Generator.permutation` makes of
    it.
    """
    return np.argsort(np.random.PCG64(stable_hash(*seed)).random_raw(n), kind="stable")


def held_out_counts(counts: Sequence[int] | np.ndarray, share: float) -> np.ndarray:
    """Return how many samples at the end of each shard are held out, int64 [S]; together they are `share` of all."""
    ends = np.floor(np.cumsum([0, *counts]) * share).astype(np.int64)
    return np.diff(ends)


class Draws(NamedTuple):
    """Consecutive draws of one dataset: int64 arrays of one length."""

    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # a tuple's method `index` is not needed here


class DatasetOrder:
    """The endless sequence of draws from one dataset.

    Memory: 8 bytes per shard and twice 8 bytes per sample of a window.

    Args:
        counts: samples of each shard, `[S]`.
        seed: selects the order, together with `name`.
        name: of the dataset.
        window: number of shards whose samples are mixed with each other.
        first: number of the first sample in each shard; None: 0.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        *,
        seed: int,
        name: str,
        window: int,
        first: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if window < 1:
            raise ConfigError(f"dataset {name}: the shuffle window must be at least 1 shard, not {window}")
        self._counts = np.asarray(counts, dtype=np.int64)
        self._first = np.zeros_like(self._counts) if first is None else np.asarray(first, dtype=np.int64)
        self._size = int(self._counts.sum())
        if self._size == 0:
            raise DataError(f"dataset {name}: its {len(self._counts)} shard(s) hold no sample")
        self._seed = (seed, name)
        self._window = window
        # Two of each, because draws near a boundary alternate between both sides of it.
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self._size

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard that are drawn, int64 [S]."""
        return self._counts

    def locate(self, k: int) -> tuple[int, int, int]:
        """Return (epoch, shard, index within the shard) of draw `k`, 0 <= k."""
        draws = self.draws(k, 1)
        return int(draws.epoch[0]), int(draws.shard[0]), int(draws.index[0])

    def draws(self, first: int, count: int) -> Draws:
        """Return draws `first` to `first + count` - 1, with one array operation per window."""
        parts, k = [], first
        while k < first + count:
            parts.append(self._within_window(k, first + count - k))
            k += len(parts[-1].epoch)
        return Draws(*(np.concatenate([*arrays, np.zeros(0, np.int64)]) for arrays in zip(*parts, strict=True)))

    def _within_window(self, k: int, most: int) -> Draws:
        """Return up to `most` draws from `k` on, to the end of its window at most."""
        epoch, position = divmod(k, self._size)
        shards, starts = self._epoch(epoch)
        # the last shard that starts at or before the position: never an empty one
        window = (int(np.searchsorted(starts, position, side="right")) - 1) // self._window
        begin = starts[window * self._window]
        samples = begin + self._window_order(epoch, window)[position - begin : position - begin + most]
        slots = np.searchsorted(starts, samples, side="right") - 1
        which = shards[slots]
        return Draws(np.full(len(samples), epoch), which, samples - starts[slots] + self._first[which])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (shards in the epoch's order [S], position at which each starts [S + 1])."""
        if epoch not in self._epochs:
            shards = permutation(len(self._counts), (*self._seed, "shards", epoch))
            _remember(self._epochs, epoch, (shards, np.concatenate(([0], np.cumsum(self._counts[shards])))))
        return self._epochs[epoch]

    def _window_order(self, epoch: int, window: int) -> np.ndarray:
        key = (epoch, window)
        if key not in self._windows:
            starts = self._epoch(epoch)[1]
            first = window * self._window
            last = min(first + self._window, len(starts) - 1)
            size = int(starts[last] - starts[first])
            _remember(self._windows, key, permutation(size, (*self._seed, "samples", epoch, window)))
        return self._windows[key]


def _remember(cache: dict, key: object, value: object) -> None:
    """Store `value`, keeping only the most recent other entry."""
    while len(cache) > 1:
        del cache[next(iter(cache))]
    cache[key] = value
