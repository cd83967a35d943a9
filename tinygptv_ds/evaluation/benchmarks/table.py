"""The table of benchmarks, and how their questions are opened, all files checked. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tinygptv_ds.config.evaluation_section import HELD_OUT, SPLITS, ScoredSection
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.benchmarks import gqa, hateful_memes, iconqa, okvqa, vizwiz, vsr
from tinygptv_ds.evaluation.benchmarks import refer as refcoco
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.held_out import KINDS, read_held_out
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, Task
from tinygptv_ds.evaluation.caption_metrics import check_packages

Places = Mapping[str, Path]


@dataclass(frozen=True)
class Published:
    """A benchmark that is distributed as files: how it is scored, what it reads below a root, and how."""

    benchmark: Benchmark
    places: Mapping[str, str]
    read: Callable[[str, Places, Checks], list[Question]]  # of a split


def _whole(module: object) -> Published:
    """A benchmark without splits."""
    return Published(module.BENCHMARK, module.PLACES, lambda split, places, checks: module.read(places, checks))


PUBLISHED: dict[str, Published] = {
    "gqa": _whole(gqa),
    "vsr": _whole(vsr),
    "iconvqa": _whole(iconqa),
    "vizwiz": _whole(vizwiz),
    "hm": _whole(hateful_memes),
    "okvqa": _whole(okvqa),
    **{
        name: Published(refcoco.BENCHMARK, refcoco.places(name), partial(refcoco.read, name))
        for name in ("refcoco", "refcoco+", "refcocog")
    },
}


def places_of(name: str, root: Path, overrides: Sequence[str] = ()) -> dict[str, Path]:
    """Where benchmark `name` reads, by place.

    Args:
        name: of the table.
        root: below which its files lie, as distributed.
        overrides: `NAME.PLACE=PATH`, other places for some of them; those of other benchmarks are passed over.

    Raises:
        ConfigError: an override that is none of any benchmark.
    """
    places = {place: root / path for place, path in PUBLISHED[name].places.items()}
    for text in overrides:
        key, equals, path = text.partition("=")
        benchmark, dot, place = key.strip().rpartition(".")
        if not equals or not dot or not path:
            raise ConfigError(f"{text}: write BENCHMARK.PLACE=PATH, for instance gqa.images=/data/gqa")
        known = [f"{each}.{one}" for each, entry in PUBLISHED.items() for one in entry.places]
        if key.strip() not in known:
            raise ConfigError(f"{key}: benchmarks have no such place{nearest(key.strip(), known)}")
        if benchmark == name:
            places[place] = Path(path)
    return places


def open_published(name: str, split: str, places: Places, checks: Checks, limit: int | None = None) -> Task:
    """A benchmark's questions, the first `limit` of them; what is wrong with its files is left in `checks`."""
    entry = PUBLISHED[name]
    label = f"{name}_{split}" if split else name
    return Task(label, entry.benchmark, entry.read(split, places, checks)[:limit])


def open_held_out(
    kind: str, shards: str, limit: int | None = None, name: str | None = None, instruction: str | None = None
) -> Task:
    """Held-out shards as a task; raises DataError as `read_held_out`, ConfigError where packages are missing."""
    if kind == "caption":
        check_packages()
    return Task(name or kind, KINDS[kind], read_held_out(kind, shards, limit, instruction))


def open_section(section: ScoredSection, limit: int | None, checks: Checks) -> Task:
    """What a recipe names; what is wrong with a benchmark's files is left in `checks`, other errors are raised."""
    if section.kind in HELD_OUT:
        return open_held_out(section.kind, section.shards, limit, section.label)
    split = section.split or next(iter(SPLITS[section.kind]), "")
    moved = [f"{section.kind}.{place}={path}" for place, path in section.places.items()]
    places = places_of(section.kind, Path(section.root), moved)
    task = open_published(section.kind, split, places, checks, limit)
    return Task(section.label, task.benchmark, task.questions)
