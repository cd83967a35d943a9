"""The table of benchmarks, and opening their questions with all files checked. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from tinygptv_ds.config.evaluation_section import SPLITS, ScoredSection
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
    """A benchmark that is distributed as files.

    Attributes:
        benchmark: how it is asked and scored.
        places: the default paths of its files and folders below a root, by name.
        read: reads the questions of a split from these places.
    """

    benchmark: Benchmark
    places: Mapping[str, str]
    read: Callable[[str, Places, Checks], list[Question]]


def _whole(module: ModuleType) -> Published:
    """Return a benchmark without splits."""
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
    """Return the paths of the files of benchmark `name`, by place.

    Args:
        name: of the table.
        root: the folder that holds its files as distributed.
        overrides: `NAME.PLACE=PATH`, other paths for some places; those of other benchmarks are ignored.

    Raises:
        ConfigError: an override names no place of any benchmark.
    """
    places = {place: root / path for place, path in PUBLISHED[name].places.items()}
    for text in overrides:
        key, equals, path = text.partition("=")
        benchmark, dot, place = key.strip().rpartition(".")
        if not equals or not dot or not path:
            raise ConfigError(f"{text}: write BENCHMARK.PLACE=PATH, for example gqa.images=/data/gqa")
        known = [f"{each}.{one}" for each, entry in PUBLISHED.items() for one in entry.places]
        if key.strip() not in known:
            raise ConfigError(f"{key}: benchmarks have no such place{nearest(key.strip(), known)}")
        if benchmark == name:
            places[place] = Path(path)
    return places


def open_published(name: str, split: str, places: Places, checks: Checks, limit: int | None = None) -> Task:
    """Read the first `limit` questions of a benchmark; problems of its files are added to `checks`."""
    entry = PUBLISHED[name]
    label = f"{name}_{split}" if split else name
    return Task(label, entry.benchmark, entry.read(split, places, checks)[:limit])


def open_held_out(
    kind: str, shards: str, limit: int | None = None, name: str | None = None, instruction: str | None = None
) -> Task:
    """Read held-out shards; raises DataError as `read_held_out`, and ConfigError where packages are missing."""
    if kind == "caption":
        check_packages()
    return Task(name or kind, KINDS[kind], read_held_out(kind, shards, limit, instruction))


def open_section(section: ScoredSection, limit: int | None, checks: Checks) -> Task:
    """Read what a recipe names; problems of a benchmark's files are added to `checks`, other errors are raised."""
    if section.shards is not None:
        return open_held_out(section.kind, section.shards, limit, section.label, section.instruction)
    split = section.split or next(iter(SPLITS[section.kind]), "")
    moved = [f"{section.kind}.{place}={path}" for place, path in section.places.items()]
    places = places_of(section.kind, Path(section.root or ""), moved)
    task = open_published(section.kind, split, places, checks, limit)
    return Task(section.label, task.benchmark, task.questions)
