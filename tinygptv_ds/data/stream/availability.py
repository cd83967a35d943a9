"""Which datasets of a recipe have their shards here, as tars, and how to train on those that have."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.data.shards.tar import check_start
from tinygptv_ds.errors import DataError
from tinygptv_ds.features.format import shards_of
from tinygptv_ds.retry import STORAGE

_AT_ONCE = 32  # shards


def absent(data: DataSection) -> dict[DatasetSection, str]:
    """Return the datasets whose shards are not all there, or are no tars, each with what is wrong and how to get it.

    Remote shards are only looked for where a folder or wildcard names them, and nothing is fetched. Of the others the
    first block is read, many at a time, as each may take a network file system some milliseconds.
    """
    problems = {}
    for section, root in [*((s, data.features) for s in data.used), *((s, None) for s in data.validation)]:
        try:
            shards = shards_of(section, root, allow_pipe=section.name in data.allow_pipe)
            unusable = _unusable([shard for shard in shards if isinstance(shard, Path)])
            if unusable:
                problems[section] = f"dataset {section.name}: {unusable}"
        except DataError as error:
            from tinygptv_ds.data.sets import how_to_get  # loads numpy and the adapters of all datasets

            remedy = f"\n{how_to_get(section.name)}" if root is None else ""
            problems[section] = f"dataset {section.name}: {error}{remedy}"
    return problems


def _unusable(tars: Sequence[Path]) -> str | None:
    """Return what is wrong with the first file that is no tar, and how many others there are."""
    with ThreadPoolExecutor(min(_AT_ONCE, len(tars)) or 1) as pool:
        found = [problem for problem in pool.map(_problem, tars) if problem is not None]
    if len(found) < 2:
        return found[0] if found else None
    more = f"{len(found) - 1} more of its {len(tars)} shards cannot be read"
    return f"{found[0]}\n{more}; 'tinygptv-ds check-data' names them"


def _problem(tar: Path) -> str | None:
    try:
        check_start(tar)
    except DataError as error:
        return str(error)
    except OSError as error:
        # What may pass, as a fault of a network does, is tried again when the shard is opened.
        return (
            None if STORAGE.may_pass(error) else f"{tar}: {error.strerror}; correct it, or leave it out of the pattern"
        )
    return None


def options_without(data: DataSection, away: Collection[DatasetSection]) -> list[str] | None:
    """Return the options with which a stage does without the datasets in `away`, quoted for a shell.

    An empty list if it uses none of them, None if no training dataset would be left.
    """
    training = [section for section in data.used if section not in away]
    validation = [section for section in data.validation if section not in away]
    if not training:
        return None
    options = []
    if len(training) < len(data.used):
        options.append(_option("data.only", [section.name for section in training]))
    if len(validation) < len(data.validation):
        options.append(_option("data.validation", [dataclasses.asdict(section) for section in validation]))
    return options


def _option(key: str, value: list[Any]) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    return f"--set {shlex.quote(f'{key}={text.strip()}')}"
