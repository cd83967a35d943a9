"""One dataset of a recipe: its shards, its samples, and where it comes from if it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from braceexpand import braceexpand

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.data.checks.sample_check import Tally, check_samples
from tinygptv_ds.data.checks.source_check import Sources, check_sources
from tinygptv_ds.data.sets import how_to_get
from tinygptv_ds.data.shards.cache import ShardCache, count_samples
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.errors import DataError

_NAMED = 5  # missing shards


@dataclass(frozen=True)
class Scope:
    """The extent of a check.

    Attributes:
        seed: the recipe's, of the random choices.
        limit: samples of a dataset, spread evenly over its shards, and entries of its own files; None: all.
        workers: processes that look.
        root: folder of the own files of datasets without shards; None: they are not searched.
        cache: where remote shards are fetched to.
        allow_pipe: the datasets whose shards may be ``pipe:`` commands.
    """

    seed: int
    limit: int | None
    workers: int = 1
    root: Path | None = None
    cache: ShardCache = field(default_factory=ShardCache)
    allow_pipe: tuple[str, ...] = ()


@dataclass
class DatasetCheck:
    """The result of checking one dataset.

    Attributes:
        section: the dataset as the recipe names it.
        found: shards that are there.
        missing: names or patterns that give no shard.
        first_missing: the first few of these.
        problem: why a run could not find its shards.
        unreadable: shards that are there and are none, each with the reason.
        samples: in the shards that are there.
        bytes: of these shards, as far as they are on this machine.
        tally: what the samples that were looked at are like.
        narrowed: where some shards are there and others not: a folder that holds the former and no other shards.
        how_to_get: where the shards come from, if they are not all there.
        sources: the dataset's own files below the root, in the same way.
    """

    section: DatasetSection
    found: int = 0
    missing: int = 0
    first_missing: list[str] = field(default_factory=list)
    problem: str | None = None
    unreadable: list[str] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    narrowed: str | None = None
    how_to_get: str | None = None
    sources: Sources | None = None

    @property
    def opens(self) -> bool:
        """Whether a run that uses the dataset could start."""
        return self.problem is None and not self.unreadable and self.samples > 0

    @property
    def whole(self) -> bool:
        """Whether additionally none of its shards is cut short."""
        return self.opens and not self.tally.cut_shards


def check_dataset(section: DatasetSection, scope: Scope) -> DatasetCheck:
    """Check the shards of a dataset and samples in them."""
    tars, missing, problem = _find(section.shards, section.name in scope.allow_pipe)
    counts, unreadable = _count(tars, scope.cache)
    check = DatasetCheck(section, len(tars), len(missing), missing[:_NAMED], problem, unreadable, sum(counts))
    check.bytes = sum(map(_bytes_of, tars))
    check.tally = check_samples(
        section, tars, counts, seed=scope.seed, limit=scope.limit, workers=scope.workers, cache=scope.cache
    )
    check.narrowed = _folder_of(tars) if missing else None
    if not check.opens:
        check.how_to_get = how_to_get(section.name)
        check.sources = check_sources(section.name, scope.root, scope.limit) if scope.root else None
    return check


def _find(pattern: str, allow_pipe: bool) -> tuple[list[Shard], list[str], str | None]:
    """Return (shards that are there, names that give none, what a run would say) for a recipe's `shards`."""
    try:
        return expand_shards(pattern, allow_pipe=allow_pipe), [], None
    except DataError as error:
        problem = str(error)
    try:
        names = list(braceexpand(pattern))
    except ValueError:  # unbalanced braces
        names = [pattern]
    found: list[Shard] = []
    missing = []
    for name in names:
        try:
            found += expand_shards(name, allow_pipe=allow_pipe)
        except DataError:
            missing.append(name)
    return found, missing, problem


def _bytes_of(tar: Shard) -> int:
    """Return the size of a file; 0 where there is none, as of a link to nothing."""
    try:
        return tar.stat().st_size if isinstance(tar, Path) else 0
    except OSError:
        return 0


def _folder_of(tars: Sequence[Shard]) -> str | None:
    """Return the folder that holds exactly these shards, if there is one."""
    folders = {tar.parent for tar in tars if isinstance(tar, Path)}
    return next((str(folder) for folder in folders if set(folder.glob("*.tar")) == set(tars)), None)


def _count(tars: Sequence[Shard], cache: ShardCache) -> tuple[list[int], list[str]]:
    """Return (samples of each shard, what is wrong with those that are no shard and count 0)."""
    try:
        return count_samples(tars, cache), []
    except DataError:
        counts, unreadable = [], []
    for tar in tars:
        try:
            counts += count_samples([tar], cache)
        except DataError as error:
            counts.append(0)
            unreadable.append(str(error))
    return counts, unreadable
